// y[m, n] = sum_k x[m, k] * scale[n, k / GROUP] * (code[n, k] - zero[n, k / GROUP]) on Hopper's tensor cores (sm_90a).
//
// The weight is the left operand of the tensor cores, so its codes go from shared memory to registers, become 16-bit
// integers there and never touch memory in their dequantized form. The batch is the
// right operand, N_TILE columns wide: at a small batch nothing is padded beyond 8.
//
// A thread block has a producer, which keeps STAGES stages of TILES x 128 inputs on their way into shared memory by the
// copy engine, and WARPGROUPS consumer warpgroups of 64 outputs each, which share x. The work (output tile, stage) is
// one long list cut into equal runs, one a block; a tile that several blocks share is summed by the last of them to
// arrive, always in the same order, so that results are reproducible.
//
// Compiled at run time by quantized_matmul_cuda.py, which prepends the function `wgmma`, hopper.cuh, packed_tile.cuh and
// work_list.cuh with their constants, and:
//   N_TILE, WARPGROUPS, RESIDENT, TILES, SCALE_SUMS (see `Launch` there), STAGES, CONSUMER_REGISTERS,
//   PRODUCER_REGISTERS

constexpr int X_HALF_BYTES = N_TILE * 128;  // of 64 inputs
constexpr int X_BYTES = 2 * TILES * X_HALF_BYTES;
constexpr int STAGE_BYTES = (X_BYTES + WARPGROUPS * TILES * TILE_BYTES + 1023) / 1024 * 1024;
constexpr int UNROLLED_HALVES = SCALE_SUMS ? 2 * TILES : 1;
// wgmma takes as long for 8 columns of x as for 64, and mma.sync, at half its best rate, for 32.
constexpr bool WGMMA = N_TILE > 16;
static_assert(WGMMA || SCALE_SUMS, "mma.sync is used on group sums only");
constexpr int CHUNK =
    SCALE_SUMS && GROUP >= 64 && N_TILE <= 32 ? 4 : 2;  // wgmmas, of 16 inputs each, between two waits for them

// ---------------------------------------------------------------------------------------------- warpgroups

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void keep_after_wait(
    float (&sums)[ACCUMULATORS]) {  // the compiler may not read them earlier
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
__device__ __forceinline__ void add_scaled(float (&sums)[ACCUMULATORS], float (&group_sums)[ACCUMULATORS],
                                           const float (&scale)[2]) {
    keep_after_wait(group_sums);
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] += scale[i / 2 % 2] * group_sums[i];
}

// The driver's description of x, for the copy engine.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// One thread keeps STAGES stages of the run in flight.
__device__ __forceinline__ void produce(const u8* weight, const TensorMap& x, Shape s, u32 item, u32 end, u32 shared,
                                        u32 full, u32 empty) {
    u64 policy;  // each weight is read once, unless there are several row tiles
    if (s.row_tiles == 1)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    struct Cursor {
        u32 tile, k_stage, stage;
        Place place;
    };
    auto advance = [&](Cursor& at) {
        if (++at.stage == STAGES) at.stage = 0;
        if (++at.k_stage == s.k_stages) at.k_stage = 0, at.place = place_of(++at.tile, s);
    };
    auto load_weight = [&](Cursor at) {
        const u32 block = at.place.output_tile * WARPGROUPS, ready = full + 8 * at.stage;
        u32 target = shared + at.stage * STAGE_BYTES + X_BYTES;
        barrier_expect(ready, X_BYTES + WARPGROUPS * TILES * TILE_BYTES);
        for (int w = 0; w < WARPGROUPS; ++w)
            for (int t = 0; t < TILES; ++t, target += TILE_BYTES) {
                // Beyond the last block nothing is stored; beyond the last tile x is zero: any finite weight will do.
                const u32 source_block = min(block + w, s.weight_blocks - 1),
                          k_tile = min(at.k_stage * TILES + t, s.k_tiles - 1);
                const u8* source = weight + (u64(source_block) * s.k_tiles + k_tile) * TILE_BYTES;
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                    "[%3], %4;" ::"r"(target),
                    "l"(source), "r"(TILE_BYTES), "r"(ready), "l"(policy)
                    : "memory");
            }
    };
    auto load_x = [&](Cursor at) {  // rows and inputs beyond the end arrive as zeros
        const int row = at.place.row_tile * N_TILE, input = at.k_stage * TILES * K_TILE;
        const u32 target = shared + at.stage * STAGE_BYTES, ready = full + 8 * at.stage;
        for (int half = 0; half < 2 * TILES; ++half)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                "[%4];" ::"r"(target + half * X_HALF_BYTES),
                "l"(&x), "r"(input + half * 64), "r"(row), "r"(ready)
                : "memory");
    };
    Cursor weight_at = {item / s.k_stages, item % s.k_stages, 0, place_of(item / s.k_stages, s)}, x_at = weight_at;
    const u32 ahead = min(end, item + STAGES);
    for (u32 i = item; i < ahead; ++i, advance(weight_at)) load_weight(weight_at);
    asm volatile("griddepcontrol.wait;" ::
                     : "memory");  // the kernel before may still be writing x, and read y; not the weight
    for (u32 i = item; i < ahead; ++i, advance(x_at)) load_x(x_at);
    u32 parity = 0;
    for (u32 i = ahead; i < end; ++i, advance(x_at)) {
        barrier_wait(empty + 8 * x_at.stage, parity);
        load_weight(x_at);
        load_x(x_at);
        if (x_at.stage == STAGES - 1) parity ^= 1;
    }
}

extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), RESIDENT)
    quantized_matmul(const u8* weight, const __grid_constant__ TensorMap x, u16* y, float* partials, u32* counters,
                     Shape s) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 shared = u32(__cvta_generic_to_shared(memory));
    const u32 full = u32(__cvta_generic_to_shared(barriers)), empty = full + 8 * STAGES;
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const u32 items = s.output_tiles() * s.row_tiles * s.k_stages;
    u32 item = first_item(blockIdx.x, items);
    const u32 begin = item, end = first_item(blockIdx.x + 1, items);
    asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may start as blocks of this one end
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4 * WARPGROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warpgroup == WARPGROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (thread == 0) produce(weight, x, s, item, end, shared, full, empty);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));

    const int row = thread / 32 * 16 + thread % 32 / 4 * 2;  // and row + 1
    // Addresses in shared memory, of the first stage.
    const u32 own_tile = shared + X_BYTES + warpgroup * TILES * TILE_BYTES;
    const u32 own_codes = keep(own_tile + thread * 16), own_scales = keep(own_tile + CODE_BYTES + row * 2);
    const u32 own_zeros = own_scales + SCALE_BYTES - row, own_full = keep(full);
    // wgmma's description of x: start, 1024 bytes from 8 rows to the next 8, 128-byte swizzle; in units of 16 bytes.
    const u32 x_start = keep(shared / 16 | 1 << 16);
    constexpr u32 X_LAYOUT = 64 | 1 << 30;
    // and mma.sync's: this lane's row of 8 and 16 bytes of inputs 0 .. 31 (32 .. 63) of a half, by the same swizzle.
    const u32 x_low = keep(shared + thread % 8 * 128 + (thread % 32 / 8 ^ thread % 8) * 16), x_high = x_low ^ 64;
    u32 stage = 0, parity = 0;
    auto release_previous = [&] {
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(own_full + 8 * (stage == 0 ? 2 * STAGES - 1 : STAGES + stage - 1));
    };
    while (item < end) {
        const u32 tile = item / s.k_stages, first_k = item % s.k_stages, count = min(end - item, s.k_stages - first_k);
        float sums[ACCUMULATORS], group_sums[ACCUMULATORS];
        float scale[2] = {0, 0};  // of group_sums
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = group_sums[i] = 0;
        u32 pairs[2][CHUNK][4];
        for (u32 k = 0; k < count; ++k) {
            const u32 stage_offset = stage * STAGE_BYTES;
            // The shuffle tells the compiler that the address is the same in all lanes.
            const u32 x_stage = __shfl_sync(~0u, x_start + stage * (STAGE_BYTES / 16), 0);
            barrier_wait(own_full + 8 * stage, parity);
#pragma unroll(UNROLLED_HALVES)
            for (int half = 0; half < 2 * TILES; ++half) {
                const u32 tile_offset = stage_offset + half / 2 * TILE_BYTES;
                u32 words[WORDS];
                load_words(words, own_codes + tile_offset + half % 2 * (CODE_BYTES / 2), thread);
#pragma unroll
                for (int chunk = 0; chunk < 4 / CHUNK; ++chunk) {
                    const int buffer = SCALE_SUMS ? (half * (4 / CHUNK) + chunk) % 2 : chunk % 2;
                    const int first_input = half % 2 * 64 + chunk * CHUNK * 16;  // of the tile
                    const Group group =
                        load_group(own_scales + tile_offset, own_zeros + tile_offset, first_input / GROUP);
#pragma unroll
                    for (int step = 0; step < CHUNK; ++step)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const u32 pair = integer_pair(words, (chunk * CHUNK + step) * 4 + i, group);
                            pairs[buffer][step][i] = SCALE_SUMS ? pair : mul(pair, group.scale_pair[i & 1]);
                        }
                    if (SCALE_SUMS && first_input % GROUP == 0) {
                        if (WGMMA) wgmma_wait<0>();
                        add_scaled(sums, group_sums, scale);
                        scale[0] = group.scale[0], scale[1] = group.scale[1];
                        if (half == 0 && chunk == 0 && k > 0) release_previous();
                    }
                    if (!WGMMA) {
#pragma unroll
                        for (int step = 0; step < CHUNK; step += 2)
#pragma unroll
                            for (int column = 0; column < N_TILE; column += 8) {
                                u32 fragment[4];
                                load_matrices(fragment, (step + chunk * CHUNK == 0 ? x_low : x_high) + stage_offset +
                                                            half * X_HALF_BYTES + column * 128);
                                mma(group_sums + column / 2, pairs[buffer][step], fragment[0], fragment[1],
                                    first_input % GROUP != 0 || step > 0);
                                mma(group_sums + column / 2, pairs[buffer][step + 1], fragment[2], fragment[3], true);
                            }
                        continue;
                    }
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < CHUNK; ++step) {
                        const u32 x_step = x_stage + half * (X_HALF_BYTES / 16) + (chunk * CHUNK + step) * 2;
                        const u64 x_operand = u64(X_LAYOUT) << 32 | x_step;
                        if (SCALE_SUMS)
                            wgmma(group_sums, pairs[buffer][step], x_operand, first_input % GROUP != 0 || step > 0);
                        else
                            wgmma(sums, pairs[buffer][step], x_operand, 1);
                    }
                    wgmma_commit();
                    wgmma_wait<1>();  // the tensor cores work on one buffer while the other is filled
                    if (!SCALE_SUMS && half == 0 && chunk == 0 && k > 0) release_previous();
                }
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (WGMMA) wgmma_wait<0>();
        if (SCALE_SUMS)
            add_scaled(sums, group_sums, scale);
        else
            keep_after_wait(sums);
        release_previous();
        const bool whole = count == s.k_stages;
        if (whole || reduce(sums, partials, counters, tile, items, s.k_stages, item == begin, warpgroup, thread)) {
            const Place place = place_of(tile, s);
            store(sums, y, s, place.row_tile, (place.output_tile * WARPGROUPS + warpgroup) * 64 + row);
        }
        item += count;
    }
}
