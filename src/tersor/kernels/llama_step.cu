// One token of one sequence through all layers of a LLaMA-family decoder, in one launch (Hopper, sm_90a).
//
//     h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rms_norm(h)
//     h = h + W_down (silu(W_gate n) * W_up n),                 n = rms_norm(h)
//
// At one token all time goes to reading weights. Every multiprocessor runs one thread block, whose producer warp sends
// for its share of all weights of all layers, in their order, into STAGES stages of shared memory, as they are used up.
// While the 16 consumer warps wait at a barrier for the other blocks, or attend, the stages fill, and are used up
// faster than the memory delivers afterwards.
//
// A matmul's work is a list of (tile of outputs, stage of 512 inputs), cut into equal runs, one a block. What a run
// adds to a tile is a piece; pieces are written to memory and added up, always in the same order, by whoever reads
// them. There is a barrier of all blocks behind each matmul and behind the attention, five a layer. The residual stream
// and its norm are computed by every block for itself, in shared memory. So all blocks must run at the same time: one a
// multiprocessor.
//
// Compiled at run time by llama_step.py, which prepends hopper.cuh, packed_tile.cuh (except for dense weights) with
// their constants, and:
//   BITS of the weights; 16: dense, [outputs, inputs], in the type of the activations
//   HIDDEN, INNER (of the feed-forward), HEADS, KV_HEADS, WIDTH (of a head), LAYERS
//   EPS, SCALE (of the scores, to powers of two), BLOCKS, STAGES, IN_FLIGHT, AHEAD (stages too), SHARED_BYTES
// HIDDEN and INNER are multiples of 64; WIDTH is 64 or 128.

constexpr u32 WARPS = 16, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 128;
constexpr u32 STAGE_INPUTS = 512;
constexpr u32 QUERIES = HEADS / KV_HEADS;  // that share a head of keys and values
constexpr u32 SPLITS = BLOCKS / KV_HEADS;  // pieces, at most, into which the positions are cut
constexpr u32 SPLIT_POSITIONS = 64;        // in a piece, at least
constexpr u32 ADDED = 4;                   // pieces that are read at once

#if BITS == 16
constexpr u32 TILE_OUTPUTS = 16;  // a row a warp
constexpr u32 STAGE_BYTES = TILE_OUTPUTS * STAGE_INPUTS * 2;
constexpr u32 PARTS = 1, SLOTS = 64;  // of a tile's sums, to be added up; finished tiles that are kept
#else
constexpr u32 TILE_OUTPUTS = 64;  // a prepared tile a warpgroup
constexpr u32 STAGE_BYTES = STAGE_INPUTS / K_TILE * TILE_BYTES;
constexpr u32 PARTS = 8, SLOTS = 5;
#endif

// How y[OUTPUTS] = W x[INPUTS] is cut.
template <u32 OUTPUTS_, u32 INPUTS_>
struct Cut {
    static constexpr u32 INPUTS = INPUTS_, OUTPUTS = OUTPUTS_;
    static constexpr u32 TILES = (OUTPUTS + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    static constexpr u32 K_STAGES = (INPUTS + STAGE_INPUTS - 1) / STAGE_INPUTS;
    static constexpr u32 ITEMS = TILES * K_STAGES;
    // Where that leaves few blocks idle, runs end where tiles do: fewer pieces.
    static constexpr u32 SHARE = TILES > BLOCKS ? 1 : BLOCKS / TILES;  // runs a tile
    static constexpr bool EVEN = TILES <= BLOCKS && K_STAGES % SHARE == 0 && SHARE * TILES * 16 >= BLOCKS * 15;
    static constexpr u32 RUNS = EVEN ? SHARE * TILES : ITEMS < BLOCKS ? ITEMS : BLOCKS;
    static constexpr u32 PIECE = (OUTPUTS + 255) / 256 * 256;  // floats from one piece of the outputs to the next
    static constexpr u32 MOST = EVEN ? SHARE : RUNS / TILES + 2 < K_STAGES ? RUNS / TILES + 2 : K_STAGES;  // pieces
    static_assert(u64(ITEMS) * RUNS < 1ull << 32, "the list is too long");

    static __device__ __forceinline__ u32 first_item(u32 block) { return block >= RUNS ? ITEMS : block * ITEMS / RUNS; }
    static __device__ __forceinline__ u32 block_of(u32 item) { return ((item + 1) * RUNS - 1) / ITEMS; }
    static __device__ __forceinline__ u32 pieces(u32 output) {
        const u32 first = output / TILE_OUTPUTS * K_STAGES;
        return block_of(first + K_STAGES - 1) - block_of(first) + 1;
    }
};
using QKV = Cut<(HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN>;
using Output = Cut<HIDDEN, HEADS * WIDTH>;
using GateUp = Cut<2 * INNER, HIDDEN>;
using Down = Cut<HIDDEN, INNER>;

struct Layer {
    const u8 *qkv, *output, *gate_up, *down;
    const float *input_norm, *mlp_norm;  // float32, as all of these
    const float *q_norm, *k_norm;        // null: none, as for the biases
    const float *qkv_bias, *output_bias, *gate_bias, *up_bias, *down_bias;
    u16 *keys, *values;  // [KV_HEADS, capacity, WIDTH]
    u64 window;          // positions that a query sees, its own included; 0: all
};

struct Step {
    const Layer* layers;
    const u16* embedding;  // [tokens, HIDDEN]
    const long long *id, *position;
    const float *cos, *sin;  // [capacity, WIDTH / 2]
    const float* final_norm;
    u16* y;  // [HIDDEN]: rms_norm of what the last layer leaves
    float *qkv_pieces, *output_pieces, *gate_up_pieces, *down_pieces;  // [MOST][PIECE] of each, by place_of
    float* attended;   // [HEADS][SPLITS][2][WIDTH / 8][4]: sums of values
    float2* softmax;   // [HEADS][SPLITS]: largest score, sum of weights
    u64* arrivals;     // at barriers, of all launches
    long long* marks;  // [BLOCKS][LAYERS][LAYER_PARTS + 1]: clocks, or null
    u64 capacity;
};

// ---------------------------------------------------------------------------------------------- shared memory

constexpr float LOWEST = -1e30f;  // of a score

__device__ constexpr u32 greatest(u32 a, u32 b) { return a > b ? a : b; }
constexpr u32 X_BYTES = greatest(greatest(QKV::K_STAGES, Output::K_STAGES), Down::K_STAGES) * STAGE_INPUTS * 2;
constexpr u32 PASS = QUERIES < 8 ? QUERIES : 8;  // queries of a head that are attended with together
constexpr u32 CHUNKS = WARPS / 2;                // of 16 positions, at the same time
constexpr u32 QUERY_BYTES = (QUERIES + 7) / 8 * 8 * (WIDTH + 8) * 2;
constexpr u32 ATTEND_BYTES = (QUERIES + 2) * WIDTH * 4 + QUERY_BYTES + CHUNKS * PASS * (WIDTH + 2) * 4;

constexpr u32 AT_RESIDUAL = STAGES * STAGE_BYTES;  // float [2][HIDDEN / 8][4]: the slots' first halves, then the second
constexpr u32 AT_X = AT_RESIDUAL + HIDDEN * 4;     // the matmul's input, or what attention needs
constexpr u32 AT_SUMS = AT_X + greatest(X_BYTES, ATTEND_BYTES);
constexpr u32 AT_LAYERS = AT_SUMS + SLOTS * PARTS * TILE_OUTPUTS * 4;
constexpr u32 AT_WARPS = AT_LAYERS + LAYERS * sizeof(Layer);
constexpr u32 AT_TURN = AT_WARPS + WARPS * 4;  // float [2][WIDTH / 2], of this position
constexpr u32 AT_BEGUN = AT_TURN + WIDTH * 4;  // matmuls that the consumers have begun, of all layers
constexpr u32 AT_BARRIERS = AT_BEGUN + 16;
static_assert(AT_BARRIERS + 2 * STAGES * 8 <= SHARED_BYTES, "_fixed_bytes in llama_step.py counts otherwise");

extern __shared__ __align__(1024) u8 memory[];

__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// Vectors are handled in slots of 8 numbers, one slot a thread. In memory the first halves of 32 slots lie side by
// side, then the second halves, so that a warp reads whole lines.
__device__ __forceinline__ u32 place_of(u32 output) {
    return output / 256 * 256 + output % 8 / 4 * 128 + output % 256 / 8 * 4 + output % 4;
}

__device__ __forceinline__ float low_of(u32 pair) {
    if (BFLOAT) return __int_as_float(pair << 16);
    float f;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(f) : "r"(pair));
    return f;
}
__device__ __forceinline__ float high_of(u32 pair) {
    if (BFLOAT) return __int_as_float(pair & 0xffff0000u);
    float f;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(f) : "r"(pair));
    return f;
}
__device__ __forceinline__ void unpack(float (&numbers)[8], uint4 pairs) {
    const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers[2 * i] = low_of(words[i]), numbers[2 * i + 1] = high_of(words[i]);
}
__device__ __forceinline__ uint4 pack_slot(const float (&v)[8]) {
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}
__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

// The consumers' threads send for a stretch of memory that they will want soon, to the L2 cache.
__device__ __forceinline__ void fetch_ahead(const void* start, u32 bytes, u32 thread, u32 threads) {
    for (u32 at = thread * 128; at < bytes; at += threads * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const u8*>(start) + at));
}

__device__ __forceinline__ void add(float (&sums)[8], float4 low, float4 high) {
    sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
    sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
}
// Adds what all pieces have for the slot from `output` on.
template <class CUT>
__device__ __forceinline__ void add_pieces(float (&sums)[8], const float* pieces, u32 output) {
    constexpr u32 AT_ONCE = CUT::MOST < ADDED ? CUT::MOST : ADDED;
    const u32 count = CUT::pieces(output);
    const float4* at = reinterpret_cast<const float4*>(pieces + place_of(output));
    const float4 nothing = make_float4(0, 0, 0, 0);
#pragma unroll
    for (u32 first = 0; first < CUT::MOST; first += AT_ONCE) {
        float4 low[AT_ONCE], high[AT_ONCE];
#pragma unroll
        for (u32 p = 0; p < AT_ONCE; ++p) {
            const bool there = first + p < count;
            low[p] = there ? __ldcg(at + (first + p) * (CUT::PIECE / 4)) : nothing;
            high[p] = there ? __ldcg(at + (first + p) * (CUT::PIECE / 4) + 32) : nothing;
        }
#pragma unroll
        for (u32 p = 0; p < AT_ONCE; ++p) add(sums, low[p], high[p]);
    }
}
__device__ __forceinline__ void add_constants(float (&sums)[8], const float* constants, u32 first) {
    if (constants == nullptr) return;
    const float4* at = reinterpret_cast<const float4*>(constants + first);
    add(sums, __ldg(at), __ldg(at + 1));
}

// ---------------------------------------------------------------------------------------------- all blocks

// Behind it all consumers of all blocks see what any wrote before it.
__device__ __forceinline__ void all_meet(u64* arrivals, u64& target) {
    consumers_meet();
    if (threadIdx.x == 0) {
        u64 seen;
        asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(arrivals) : "memory");
        do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(arrivals) : "memory");
        while (seen < target);
    }
    target += BLOCKS;
    consumers_meet();
}

// ---------------------------------------------------------------------------------------------- the producer

struct Ring {
    u32 stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Of the producer: the stage to fill next, the one filled last, and the first of those that may still be on their way.
struct Sender {
    Ring next, last, oldest;
    u32 sent;
    u64 policy;
};

// Where an item's weights lie: COPIES stretches, one a lane.
constexpr u32 COPIES = BITS == 16 ? TILE_OUTPUTS : 1;
struct Source {
    const u8* at;
    u32 bytes;
};
template <class CUT>
__device__ __forceinline__ Source source_of(const u8* weight, u32 item, u32 lane) {
    const u32 tile = item / CUT::K_STAGES, k_stage = item % CUT::K_STAGES;
#if BITS == 16
    const u64 first = (u64(tile) * TILE_OUTPUTS + lane) * CUT::INPUTS + k_stage * STAGE_INPUTS;
    return {weight + first * 2, min(STAGE_INPUTS, CUT::INPUTS - k_stage * STAGE_INPUTS) * 2};
#else
    constexpr u32 K_TILES = (CUT::INPUTS + K_TILE - 1) / K_TILE, STAGE_TILES = STAGE_INPUTS / K_TILE;
    const u64 first = u64(tile) * K_TILES + k_stage * STAGE_TILES;
    return {weight + first * TILE_BYTES, min(STAGE_TILES, K_TILES - k_stage * STAGE_TILES) * TILE_BYTES};
#endif
}

// Sends for the items of this block's run, each as soon as a stage is empty.
//
// What the multiprocessors have asked for waits in a line ahead of the memory, and so does all else that they ask for
// in the meantime, barriers and pieces too: a block that asks for all its stages at once lengthens everybody's wait by
// microseconds. So no more than IN_FLIGHT stages are under way, and one alone for a matmul that the consumers have not
// begun.
//
// While no stage is empty and nothing is under way, the items to come are brought into the L2 cache, up to AHEAD of
// them.
template <class CUT>
__device__ __forceinline__ void load(const u8* weight, u32 number, u32 shared, Sender& sender) {
    const u32 lane = threadIdx.x % 32, full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
    const u32 begin = CUT::first_item(blockIdx.x), end = CUT::first_item(blockIdx.x + 1);
    u32 ahead = begin;
    for (u32 item = begin; item < end; ++item) {
        const u32 stage = sender.next.stage, ready = full + 8 * stage, last = full + 8 * sender.last.stage;
        ahead = max(ahead, item);
        while (!barrier_passed(empty + 8 * stage, sender.next.parity ^ 1))
            if (ahead < min(end, item + AHEAD) && barrier_passed(last, sender.last.parity)) {
                const Source source = source_of<CUT>(weight, ahead++, lane);
                if (lane < COPIES)
                    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source.at), "r"(source.bytes)
                                 : "memory");
                __nanosleep(400);  // about as long as it takes
            }
        if (sender.sent++ >= IN_FLIGHT) {
            barrier_wait(full + 8 * sender.oldest.stage, sender.oldest.parity);
            sender.oldest.next();
        }
        if (*reinterpret_cast<volatile u32*>(memory + AT_BEGUN) <= number) barrier_wait(last, sender.last.parity);
        const Source source = source_of<CUT>(weight, item, lane);
        if (lane == 0) barrier_expect(ready, source.bytes * COPIES);
        __syncwarp();
        if (lane < COPIES)
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[%0], [%1], %2, [%3], %4;" ::"r"(shared + stage * STAGE_BYTES + lane * (STAGE_BYTES / COPIES)),
                "l"(source.at), "r"(source.bytes), "r"(ready), "l"(sender.policy)
                : "memory");
        sender.last = sender.next;
        sender.next.next();
    }
}

// ---------------------------------------------------------------------------------------------- matmul

// What `count` stages from k on add to their tile of W x, into a slot of sums. x lies in shared memory.
template <class CUT>
__device__ __forceinline__ void accumulate(u32 slot, u32 first_k, u32 count, u32 shared, Ring& ring) {
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
    float* sums = reinterpret_cast<float*>(memory + AT_SUMS);  // [SLOTS][PARTS][TILE_OUTPUTS]
#if BITS == 16
    float total = 0;
    for (u32 k = first_k; k < first_k + count; ++k, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const u32 row = shared + ring.stage * STAGE_BYTES + warp * STAGE_INPUTS * 2 + lane * 16;
        const u32 x = shared + AT_X + k * STAGE_INPUTS * 2 + lane * 16;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (CUT::INPUTS % STAGE_INPUTS != 0 && k * STAGE_INPUTS + half * 256 + lane * 8 >= CUT::INPUTS) continue;
            float weights[8], inputs[8];
            unpack(weights, load_shared(row + half * 512));
            unpack(inputs, load_shared(x + half * 512));
#pragma unroll
            for (int i = 0; i < 8; ++i) total += weights[i] * inputs[i];
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
    }
#pragma unroll
    for (u32 other = 16; other > 0; other /= 2) total += __shfl_xor_sync(~0u, total, other);
    if (lane == 0) sums[slot * TILE_OUTPUTS + warp] = total;
#else
    // A warp multiplies two strips of 16 outputs by half a tile's inputs.
    constexpr u32 K_TILES = (CUT::INPUTS + K_TILE - 1) / K_TILE, HALF_GROUPS = GROUP < 64 ? 64 / GROUP : 1;
    const u32 warpgroup = warp / 4, half = warp % 4 / 2, strip = warp % 2 * 2, row = strip * 16 + lane / 4 * 2;
    float total[2][2] = {{0, 0}, {0, 0}};  // of outputs row, row + 1 and row + 16, row + 17
    for (u32 k = first_k; k < first_k + count; ++k, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const u32 k_tile = k * (STAGE_INPUTS / K_TILE) + warpgroup;
        const bool inside = CUT::INPUTS % STAGE_INPUTS == 0 || k_tile < K_TILES;
        u32 words[2][WORDS];
        Group groups[2][HALF_GROUPS];
        if (inside) {
            const u32 tile = shared + ring.stage * STAGE_BYTES + warpgroup * TILE_BYTES;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 place = (strip + i) * 32 + lane, scales = tile + CODE_BYTES + (row + 16 * i) * 2;
                load_words(words[i], tile + half * (CODE_BYTES / 2) + place * 16, place);
#pragma unroll
                for (u32 g = 0; g < HALF_GROUPS; ++g)
                    groups[i][g] = load_group(scales, scales + SCALE_BYTES - (row + 16 * i), half * 64 / GROUP + g);
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
        if (!inside) continue;
        const u32 x = shared + AT_X + (k_tile * K_TILE + half * 64) * 2 + lane / 8 * 16;
        float products[2][4];
#pragma unroll
        for (u32 chunk = 0; chunk < 2; ++chunk) {  // of 32 inputs; all columns of the tensor cores' x are the same
            u32 inputs[4];
            load_matrices(inputs, x + chunk * 64);
            const u32 g = chunk * 32 / GROUP;
            const bool begins = chunk * 32 % GROUP == 0, ends = (chunk + 1) * 32 % GROUP == 0 || chunk == 1;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                u32 pairs[2][4];
#pragma unroll
                for (int pair = 0; pair < 8; ++pair)
                    pairs[pair / 4][pair % 4] = integer_pair(words[i], int(chunk * 8) + pair, groups[i][g]);
                mma(products[i], pairs[0], inputs[0], inputs[1], !begins);
                mma(products[i], pairs[1], inputs[2], inputs[3], true);
                if (ends) {
                    total[i][0] += groups[i][g].scale[0] * products[i][0];
                    total[i][1] += groups[i][g].scale[1] * products[i][2];
                }
            }
        }
    }
    if (lane % 4 == 0)
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            *reinterpret_cast<float2*>(sums + (slot * PARTS + warpgroup * 2 + half) * TILE_OUTPUTS + row + 16 * i) =
                make_float2(total[i][0], total[i][1]);
#endif
}

// Pieces of W x for this block's run.
template <class CUT>
__device__ __forceinline__ void multiply(float* pieces, u32 shared, Ring& ring) {
    const u32 thread = threadIdx.x;
    if (thread == 0) ++*reinterpret_cast<volatile u32*>(memory + AT_BEGUN);
    const float* sums = reinterpret_cast<const float*>(memory + AT_SUMS);
    const u32 end = CUT::first_item(blockIdx.x + 1);
    u32 item = CUT::first_item(blockIdx.x), slot = 0, slot_tile = item / CUT::K_STAGES;
    const u32 first_tile = slot_tile;

    auto write = [&] {  // what the slots hold
        consumers_meet();
        for (u32 i = thread; i < slot * TILE_OUTPUTS; i += CONSUMERS) {
            const u32 tile = slot_tile + i / TILE_OUTPUTS, output = i % TILE_OUTPUTS;
            float sum = 0;
#pragma unroll
            for (u32 part = 0; part < PARTS; ++part)
                sum += sums[(i / TILE_OUTPUTS * PARTS + part) * TILE_OUTPUTS + output];
            // Of its first tile other blocks may have earlier pieces; further tiles begin here.
            const u32 piece = tile == first_tile ? blockIdx.x - CUT::block_of(tile * CUT::K_STAGES) : 0;
            __stcg(pieces + u64(piece) * CUT::PIECE + place_of(tile * TILE_OUTPUTS + output), sum);
        }
        slot_tile += slot, slot = 0;
    };

    while (item < end) {
        if (slot == SLOTS) {
            write();
            consumers_meet();
        }
        const u32 count = min(end - item, CUT::K_STAGES - item % CUT::K_STAGES);
        accumulate<CUT>(slot++, item % CUT::K_STAGES, count, shared, ring);
        item += count;
    }
    if (slot > 0) write();
}

// ---------------------------------------------------------------------------------------------- between the matmuls

// A norm's weight for this thread's slots of the residual stream.
constexpr u32 TURNS = (HIDDEN / 8 + CONSUMERS - 1) / CONSUMERS;
struct Factors {
    float4 low[TURNS], high[TURNS];
};
__device__ __forceinline__ Factors load_factors(const float* weight) {
    Factors factors;
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 slot = turn * CONSUMERS + threadIdx.x;
        if (HIDDEN / 8 % CONSUMERS != 0 && slot >= HIDDEN / 8) continue;
        factors.low[turn] = __ldg(reinterpret_cast<const float4*>(weight) + 2 * slot);
        factors.high[turn] = __ldg(reinterpret_cast<const float4*>(weight) + 2 * slot + 1);
    }
    return factors;
}

// residual += pieces + bias, or = embedding where that is given; then x = rms_norm(residual) * factors, or y where that
// is given.
template <class CUT>
__device__ __forceinline__ void add_norm(const u16* embedding, const float* pieces, const float* bias,
                                         const Factors& factors, u16* y) {
    const u32 thread = threadIdx.x;
    float4* residual = reinterpret_cast<float4*>(memory + AT_RESIDUAL);  // [2][HIDDEN / 8]
    float* warp_sums = reinterpret_cast<float*>(memory + AT_WARPS);
    float v[TURNS][8], squares = 0;
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 slot = turn * CONSUMERS + thread;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[turn][i] = 0;
        if (HIDDEN / 8 % CONSUMERS != 0 && slot >= HIDDEN / 8) continue;
        if (embedding != nullptr) {
            unpack(v[turn], __ldg(reinterpret_cast<const uint4*>(embedding) + slot));
        } else {
            add_pieces<CUT>(v[turn], pieces, slot * 8);
            add_constants(v[turn], bias, slot * 8);
            add(v[turn], residual[slot], residual[HIDDEN / 8 + slot]);
        }
        residual[slot] = make_float4(v[turn][0], v[turn][1], v[turn][2], v[turn][3]);
        residual[HIDDEN / 8 + slot] = make_float4(v[turn][4], v[turn][5], v[turn][6], v[turn][7]);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += v[turn][i] * v[turn][i];
    }
#pragma unroll
    for (u32 other = 16; other > 0; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    if (thread % 32 == 0) warp_sums[thread / 32] = squares;
    consumers_meet();
    float total = 0;
#pragma unroll
    for (u32 warp = 0; warp < WARPS; ++warp) total += warp_sums[warp];
    const float scale = rsqrtf(total / HIDDEN + EPS);
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 slot = turn * CONSUMERS + thread;
        if (HIDDEN / 8 % CONSUMERS != 0 && slot >= HIDDEN / 8) continue;
        const float4 low = factors.low[turn], high = factors.high[turn];
        const float weight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[turn][i] *= scale * weight[i];
        uint4* target = y != nullptr ? reinterpret_cast<uint4*>(y) : reinterpret_cast<uint4*>(memory + AT_X);
        target[slot] = pack_slot(v[turn]);
    }
    // The last stage's inputs beyond the end are multiplied too.
    for (u32 slot = HIDDEN / 8 + thread; slot < QKV::K_STAGES * (STAGE_INPUTS / 8); slot += CONSUMERS)
        reinterpret_cast<uint4*>(memory + AT_X)[slot] = make_uint4(0, 0, 0, 0);
    consumers_meet();
}

// x = what `fill` gives for a slot, in the stretch of the inputs that this block's run reads.
template <class CUT, class FILL>
__device__ __forceinline__ void fill_x(const FILL& fill) {
    constexpr u32 STAGE_SLOTS = STAGE_INPUTS / 8, AT_ONCE = 2;
    const u32 begin = CUT::first_item(blockIdx.x), end = CUT::first_item(blockIdx.x + 1);
    const u32 first_k = begin % CUT::K_STAGES, slots = min(end - begin, CUT::K_STAGES) * STAGE_SLOTS;
    uint4* x = reinterpret_cast<uint4*>(memory + AT_X);
    for (u32 first = threadIdx.x; first < slots; first += AT_ONCE * CONSUMERS) {
        float v[AT_ONCE][8];
        u32 slot[AT_ONCE];
#pragma unroll
        for (u32 u = 0; u < AT_ONCE; ++u) {
            const u32 i = first + u * CONSUMERS;
            u32 k = first_k + i / STAGE_SLOTS;
            if (k >= CUT::K_STAGES) k -= CUT::K_STAGES;
            slot[u] = k * STAGE_SLOTS + i % STAGE_SLOTS;
#pragma unroll
            for (int e = 0; e < 8; ++e) v[u][e] = 0;
            if (i < slots && slot[u] * 8 < CUT::INPUTS) fill(v[u], slot[u] * 8);
        }
#pragma unroll
        for (u32 u = 0; u < AT_ONCE; ++u)
            if (first + u * CONSUMERS < slots) x[slot[u]] = pack_slot(v[u]);
    }
    consumers_meet();
}

// x = silu(gate) * up.
__device__ __forceinline__ void gate(const Layer& layer, const float* pieces) {
    fill_x<Down>([&](float (&v)[8], u32 first) {
        float up[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        add_pieces<GateUp>(v, pieces, first);
        add_pieces<GateUp>(up, pieces, INNER + first);
        add_constants(v, layer.gate_bias, first);
        add_constants(up, layer.up_bias, first);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = v[i] / (1 + __expf(-v[i])) * up[i];
    });
}

// ---------------------------------------------------------------------------------------------- attention

// How the positions that a query sees, from `begin` up to `end`, are cut: `splits` pieces of `share`.
struct Positions {
    u32 begin, end, share, splits;
};
__device__ __forceinline__ Positions positions_of(u32 end, u64 window) {
    const u32 begin = window > 0 && window < end ? end - u32(window) : 0, count = end - begin;
    const u32 wanted = min(SPLITS, (count + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS);
    const u32 share = (count + wanted - 1) / wanted;
    return {begin, end, share, (count + share - 1) / share};
}

// This block's piece of the attention: one head of keys and values, one stretch of positions. The block of the last
// stretch puts the new key and value into the cache.
//
// Two warps take 16 positions at a time on the tensor cores, each for half of the values' numbers: scores are queries
// times keys; weights, which come out as the tensor cores want them back, times values. Which number of a head is which
// of an operand's does not matter where both operands agree, and is chosen so that a lane loads 16 bytes.
__device__ __forceinline__ void attend(const Step& s, const Layer& layer, const Positions& at) {
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const u32 kv_head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;
    if (split >= at.splits) return;
    const u32 position = at.end - 1;
    const bool last = split == at.splits - 1;
    constexpr u32 Q_ROW = WIDTH + 8;                        // which keeps lanes off each other's banks
    float* rows = reinterpret_cast<float*>(memory + AT_X);  // [QUERIES of q, one of k, one of v][WIDTH]
    u16* fresh =
        reinterpret_cast<u16*>(rows + QUERIES * WIDTH);  // [2][2 WIDTH], each in its row: the new key and value
    u16* queries = reinterpret_cast<u16*>(rows + (QUERIES + 2) * WIDTH);  // [QUERIES, to whole eights][Q_ROW]
    const float* turn = reinterpret_cast<const float*>(memory + AT_TURN);
    u16* keys = layer.keys + kv_head * s.capacity * WIDTH;
    u16* values = layer.values + kv_head * s.capacity * WIDTH;
    const u32 start = at.begin + split * at.share, stop = min(start + at.share, at.end);

    // Keys of positions g and g + 8 of 16, numbers 8 (t + 4 j) + 0 .. 7.
    // Values of positions 2t, 2t + 1, 2t + 8 and 2t + 9, V_WORDS pairs of numbers from first_value on.
    constexpr u32 K_LOADS = WIDTH / 32, V_WORDS = WIDTH / 32;
    const u32 chunk = warp / 2, first_value = warp % 2 * (WIDTH / 2) + g * 2 * V_WORDS;
    uint4 key[2][K_LOADS];
    u32 value[4][V_WORDS];
    auto load_row = [&](u32(&words)[V_WORDS], const u16* row) {
        if (V_WORDS == 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(row + first_value);
            words[0] = four.x, words[1] = four.y, words[2 % V_WORDS] = four.z, words[3 % V_WORDS] = four.w;
        } else {
            const uint2 two = *reinterpret_cast<const uint2*>(row + first_value);
            words[0] = two.x, words[1] = two.y;
        }
    };
    auto load = [&](u32 first, bool new_one) {  // the new position alone, or all others
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
            const u32 p = first + 8 * n + g;
            if (p >= stop || (p == position) != new_one) continue;
            const u16* row = new_one ? fresh : keys + u64(p) * WIDTH;
#pragma unroll
            for (u32 j = 0; j < K_LOADS; ++j) key[n][j] = *reinterpret_cast<const uint4*>(row + 8 * (t + 4 * j));
        }
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            const u32 p = first + r / 2 * 8 + 2 * t + r % 2;
            if (p < stop && (p == position) == new_one)
                load_row(value[r], new_one ? fresh + 2 * WIDTH : values + u64(p) * WIDTH);
        }
    };
    auto clear = [&] {
#pragma unroll
        for (u32 j = 0; j < K_LOADS; ++j) key[0][j] = key[1][j] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (u32 i = 0; i < 4 * V_WORDS; ++i) value[i / V_WORDS][i % V_WORDS] = 0;
    };
    clear();
    load(start + chunk * 16, false);  // all but the new key and value are there already

    for (u32 i = 2 * thread; i < (QUERIES + 2) * WIDTH; i += 2 * CONSUMERS) {
        const u32 row = i / WIDTH;
        const u32 head = row < QUERIES ? kv_head * QUERIES + row : HEADS + (row - QUERIES) * KV_HEADS + kv_head;
        const u32 output = head * WIDTH + i % WIDTH, count = QKV::pieces(output);
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (u32 p = 0; p < QKV::MOST; ++p)
            if (p < count) {
                const float2 piece =
                    __ldcg(reinterpret_cast<const float2*>(s.qkv_pieces + p * QKV::PIECE + place_of(output)));
                sum.x += piece.x, sum.y += piece.y;
            }
        if (layer.qkv_bias != nullptr) {
            const float2 bias = __ldg(reinterpret_cast<const float2*>(layer.qkv_bias + output));
            sum.x += bias.x, sum.y += bias.y;
        }
        *reinterpret_cast<float2*>(rows + i) = sum;
    }
    for (u32 i = QUERIES * Q_ROW + thread; i < QUERY_BYTES / 2; i += CONSUMERS) queries[i] = 0;
    consumers_meet();
    constexpr u32 HALF = WIDTH / 2, PAIRS = HALF / 32;  // number i of a head turns with number i + WIDTH / 2
    for (u32 row = warp; row < QUERIES + 2; row += WARPS) {
        if (row >= QUERIES && !last) continue;
        float low[PAIRS], high[PAIRS], squares = 0;
#pragma unroll
        for (u32 i = 0; i < PAIRS; ++i) {
            low[i] = rows[row * WIDTH + i * 32 + lane], high[i] = rows[row * WIDTH + HALF + i * 32 + lane];
            squares += low[i] * low[i] + high[i] * high[i];
        }
        const float* norm = row < QUERIES ? layer.q_norm : row == QUERIES ? layer.k_norm : nullptr;
        if (norm != nullptr) {
#pragma unroll
            for (u32 other = 16; other > 0; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
            const float scale = rsqrtf(squares / WIDTH + EPS);
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) {
                low[i] *= scale * __ldg(norm + i * 32 + lane);
                high[i] *= scale * __ldg(norm + HALF + i * 32 + lane);
            }
        }
        if (row <= QUERIES)
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) {
                const float cos = turn[i * 32 + lane], sin = turn[HALF + i * 32 + lane];
                const float turned = low[i] * cos - high[i] * sin;
                high[i] = high[i] * cos + low[i] * sin;
                low[i] = turned;
            }
        u16* cache = (row == QUERIES ? keys : values) + u64(position) * WIDTH;
        u16* copy = row < QUERIES ? queries + row * Q_ROW : fresh + (row - QUERIES) * 2 * WIDTH;
        __syncwarp();  // its row is read
#pragma unroll
        for (u32 i = 0; i < PAIRS; ++i) {
            const u32 number = i * 32 + lane, pair = pack(low[i], high[i]);
            copy[number] = pair & 0xffff, copy[HALF + number] = pair >> 16;
            if (row >= QUERIES) cache[number] = pair & 0xffff, cache[HALF + number] = pair >> 16;
        }
    }
    consumers_meet();

    constexpr u32 TILES =
        V_WORDS;  // of 16 of this warp's values' numbers: rows g are a word's first, rows g + 8 its second
    float* chunk_sums = reinterpret_cast<float*>(queries + QUERY_BYTES / 2);                // [CHUNKS][PASS][WIDTH]
    float2* chunk_softmax = reinterpret_cast<float2*>(chunk_sums + CHUNKS * PASS * WIDTH);  // [CHUNKS][PASS]
    const u32 chunks = min(CHUNKS, (stop - start + 15) / 16);
    for (u32 pass = 0; pass < QUERIES; pass += PASS) {
        float sums[TILES][4], largest = LOWEST, total = 0;  // sums of queries 2t, 2t + 1; the rest of query g
#pragma unroll
        for (u32 i = 0; i < 4 * TILES; ++i) sums[i / 4][i % 4] = 0;
        for (u32 first = start + chunk * 16; first < stop; first += CHUNKS * 16) {
            if (pass > 0 || first != start + chunk * 16) {
                clear();
                load(first, false);
            }
            if (first + 16 > position) load(first, true);
            float scores[2][4];
#pragma unroll
            for (u32 j = 0; j < K_LOADS; ++j) {
                const uint4 q = *reinterpret_cast<const uint4*>(queries + (pass + g) * Q_ROW + 8 * (t + 4 * j));
                const u32 low[4] = {q.x, 0, q.y, 0}, high[4] = {q.z, 0, q.w, 0};
#pragma unroll
                for (u32 n = 0; n < 2; ++n) {
                    mma(scores[n], low, key[n][j].x, key[n][j].y, j > 0);
                    mma(scores[n], high, key[n][j].z, key[n][j].w, true);
                }
            }
            float higher = largest;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float& score = scores[i / 2][i % 2];
                score = first + i / 2 * 8 + 2 * t + i % 2 < stop ? score * SCALE : LOWEST;
                higher = fmaxf(higher, score);
            }
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
            const float shrink = exp2f(largest - higher);
            largest = higher, total *= shrink;
            float weights[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                weights[i] = exp2f(scores[i / 2][i % 2] - higher);  // the first position is seen: higher is a score
                total += weights[i];
            }
            const u32 weights_low = pack(weights[0], weights[1]), weights_high = pack(weights[2], weights[3]);
            const float shrinks[2] = {__shfl_sync(~0u, shrink, 8 * t), __shfl_sync(~0u, shrink, 8 * t + 4)};
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[tile][i] *= shrinks[i % 2];
                const u32 operand[4] = {__byte_perm(value[0][tile], value[1][tile], 0x5410),
                                        __byte_perm(value[0][tile], value[1][tile], 0x7632),
                                        __byte_perm(value[2][tile], value[3][tile], 0x5410),
                                        __byte_perm(value[2][tile], value[3][tile], 0x7632)};
                mma(sums[tile], operand, weights_low, weights_high, true);
            }
        }
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (chunk < chunks) {
#pragma unroll
            for (u32 i = 0; i < 2 * TILES; ++i) {
                const u32 r = 2 * t + i % 2, tile = i / 2;
                if (r < PASS)
                    *reinterpret_cast<float2*>(chunk_sums + (chunk * PASS + r) * WIDTH + first_value + 2 * tile) =
                        make_float2(sums[tile][i % 2], sums[tile][2 + i % 2]);
            }
            if (warp % 2 == 0 && t == 0 && g < PASS) chunk_softmax[chunk * PASS + g] = make_float2(largest, total);
        }
        consumers_meet();
        for (u32 i = thread; i < PASS * WIDTH; i += CONSUMERS) {
            const u32 r = i / WIDTH,
                      number = i % WIDTH;  // r is the same for a whole warp, of which each lane has a chunk
            if (pass + r >= QUERIES) continue;
            const float2 part = chunk_softmax[min(lane % CHUNKS, chunks - 1) * PASS + r];
            float both = part.x, sum = 0;
#pragma unroll
            for (u32 other = CHUNKS / 2; other > 0; other /= 2) both = fmaxf(both, __shfl_xor_sync(~0u, both, other));
            const float share = exp2f(part.x - both);
            float weights = lane % CHUNKS < chunks ? share * part.y : 0;
#pragma unroll
            for (u32 other = CHUNKS / 2; other > 0; other /= 2) weights += __shfl_xor_sync(~0u, weights, other);
            for (u32 c = 0; c < chunks; ++c)
                sum += __shfl_sync(~0u, share, c) * chunk_sums[(c * PASS + r) * WIDTH + number];
            const u32 to = (kv_head * QUERIES + pass + r) * SPLITS + split;
            __stcg(s.attended + u64(to) * WIDTH + number % 8 / 4 * (WIDTH / 2) + number / 8 * 4 + number % 4, sum);
            if (number == 0) __stcg(s.softmax + to, make_float2(both, weights));
        }
        consumers_meet();
    }
}

// x = what the stretches of positions give together.
__device__ __forceinline__ void join_attention(const Step& s, u32 splits) {
    fill_x<Output>([&](float (&v)[8], u32 first) {
        const u32 head = first / WIDTH;
        const float2* softmax = s.softmax + head * SPLITS;
        const float4* attended =
            reinterpret_cast<const float4*>(s.attended + u64(head) * SPLITS * WIDTH) + first % WIDTH / 8;
        float largest = LOWEST, total = 0;
        for (u32 start = 0; start < splits; start += 4) {
            float2 part[4];
            float4 low[4], high[4];
#pragma unroll
            for (u32 p = 0; p < 4; ++p) {
                const u32 split = min(start + p, splits - 1);
                part[p] = __ldcg(softmax + split);
                if (start + p >= splits) part[p] = make_float2(LOWEST, 0);
                low[p] = __ldcg(attended + split * (WIDTH / 4));
                high[p] = __ldcg(attended + split * (WIDTH / 4) + WIDTH / 8);
            }
            const float higher = fmaxf(largest, fmaxf(fmaxf(part[0].x, part[1].x), fmaxf(part[2].x, part[3].x)));
            const float shrink = exp2f(largest - higher);
            total *= shrink;
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] *= shrink;
#pragma unroll
            for (u32 p = 0; p < 4; ++p) {
                const float share = exp2f(part[p].x - higher);
                total += share * part[p].y;
                v[0] += share * low[p].x, v[1] += share * low[p].y, v[2] += share * low[p].z, v[3] += share * low[p].w;
                v[4] += share * high[p].x, v[5] += share * high[p].y, v[6] += share * high[p].z;
                v[7] += share * high[p].w;
            }
            largest = higher;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] /= total;
    });
}

// ---------------------------------------------------------------------------------------------- the step

constexpr u32 LAYER_PARTS = 14;  // between two marks each; PARTS in llama_step.py names them

extern "C" __global__ void __launch_bounds__(THREADS, 1) llama_step(const __grid_constant__ Step s) {
    const u32 shared = u32(__cvta_generic_to_shared(memory)), thread = threadIdx.x;
    Layer* layers = reinterpret_cast<Layer*>(memory + AT_LAYERS);
    asm volatile("griddepcontrol.launch_dependents;");
    for (u32 i = thread; i < LAYERS * sizeof(Layer) / 8; i += THREADS)
        reinterpret_cast<u64*>(layers)[i] = __ldg(reinterpret_cast<const u64*>(s.layers) + i);
    if (thread == 0) {
        const u32 full = shared + AT_BARRIERS, empty = full + 8 * STAGES;
        *reinterpret_cast<u32*>(memory + AT_BEGUN) = 0;
        for (u32 i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (thread >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread >= CONSUMERS + 32) return;
        Sender sender = {{0, 0}, {STAGES - 1, 1}, {0, 0}, 0, 0};  // `last`, before the first, has arrived
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(sender.policy));  // each weight is read once
        for (u32 l = 0; l < LAYERS; ++l) {
            load<QKV>(layers[l].qkv, 4 * l, shared, sender);
            load<Output>(layers[l].output, 4 * l + 1, shared, sender);
            load<GateUp>(layers[l].gate_up, 4 * l + 2, shared, sender);
            load<Down>(layers[l].down, 4 * l + 3, shared, sender);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");  // 96 at launch, and what the producer gave back
    asm volatile("griddepcontrol.wait;" ::: "memory");     // the step before may still be writing what this one reads
    const u32 end = u32(*s.position) + 1;
    const u16* embedding = s.embedding + *s.id * HIDDEN;
    u64 target;  // of arrivals, of which this launch has made none before this block arrives
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(target) : "l"(s.arrivals) : "memory");
    target = target / BLOCKS * BLOCKS + BLOCKS;
    const u32 everyone = blockIdx.x * CONSUMERS + thread;
    if (thread < WIDTH)  // cosines, then sines
        reinterpret_cast<float*>(memory + AT_TURN)[thread] =
            (thread < WIDTH / 2 ? s.cos : s.sin)[u64(end - 1) * (WIDTH / 2) + thread % (WIDTH / 2)];
    Factors factors = load_factors(layers[0].input_norm);
    Ring ring = {0, 0};

    u32 layer_number = 0, part = 0;
    auto mark = [&] {
        if (s.marks != nullptr && thread == 0)
            s.marks[(blockIdx.x * LAYERS + layer_number) * (LAYER_PARTS + 1) + part++] = clock64();
    };
    for (u32 l = 0; l < LAYERS; ++l) {
        const Layer& layer = layers[l];
        const Positions at = positions_of(end, layer.window);
        layer_number = l, part = 0;
        mark();
        add_norm<Down>(l == 0 ? embedding : nullptr, s.down_pieces, l == 0 ? nullptr : layers[l - 1].down_bias, factors,
                       nullptr);
        if (blockIdx.x / KV_HEADS < at.splits) {
            const u32 start = at.begin + blockIdx.x / KV_HEADS * at.share;
            const u32 bytes = min(at.share, at.end - start) * WIDTH * 2;
            const u64 offset = (blockIdx.x % KV_HEADS * s.capacity + start) * WIDTH;
            fetch_ahead(layer.keys + offset, bytes, thread, CONSUMERS);
            fetch_ahead(layer.values + offset, bytes, thread, CONSUMERS);
        }
        mark();
        multiply<QKV>(s.qkv_pieces, shared, ring);
        mark();
        all_meet(s.arrivals, target);
        mark();
        attend(s, layer, at);
        mark();
        all_meet(s.arrivals, target);
        mark();
        join_attention(s, at.splits);
        fetch_ahead(layer.mlp_norm, HIDDEN * 4, everyone, BLOCKS * CONSUMERS);
        mark();
        multiply<Output>(s.output_pieces, shared, ring);
        factors = load_factors(layer.mlp_norm);
        mark();
        all_meet(s.arrivals, target);
        mark();
        add_norm<Output>(nullptr, s.output_pieces, layer.output_bias, factors, nullptr);
        mark();
        multiply<GateUp>(s.gate_up_pieces, shared, ring);
        mark();
        all_meet(s.arrivals, target);
        mark();
        gate(layer, s.gate_up_pieces);
        const float* next_norm = l + 1 < LAYERS ? layers[l + 1].input_norm : s.final_norm;
        fetch_ahead(next_norm, HIDDEN * 4, everyone, BLOCKS * CONSUMERS);
        mark();
        multiply<Down>(s.down_pieces, shared, ring);
        factors = load_factors(next_norm);
        mark();
        all_meet(s.arrivals, target);
        mark();
    }
    if (blockIdx.x != 0) return;
    add_norm<Down>(nullptr, s.down_pieces, layers[LAYERS - 1].down_bias, factors, s.y);
}
