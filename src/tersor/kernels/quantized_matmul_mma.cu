// y[m, n] = sum_k x[m, k] * scale[n, k / GROUP] * (code[n, k] - zero[n, k / GROUP]) by mma.sync and cp.async, which every
// NVIDIA GPU from compute capability 8.0 on has. quantized_matmul.cu is its sibling for Hopper; the weight's tiles, how codes
// become numbers and how the work is dealt out are the same, as wgmma's left operand lies in registers as mma.sync's does.
//
// A thread block computes output tiles of TILE_BLOCKS * 64 outputs x N_TILE rows of x. Its warps are WARPS_OUT along the
// outputs, each with STRIPS strips of 16, which share a fragment of x, by WARPS_IN along the inputs of a stage, whose sums are
// added in shared memory once a tile is done. All threads keep STAGES - 1 stages of TILES x 128 inputs on their way.
//
// Compiled at run time by quantized_matmul_mma.py, which prepends hopper.cuh, packed_tile.cuh and work_list.cuh with their
// constants, and:
//   N_TILE, STRIPS, WARPS_OUT, WARPS_IN, RESIDENT, TILES, SCALE_SUMS, ZERO_SUMS (see `Launch` there), STAGES

constexpr int THREADS = 32 * WARPS_OUT * WARPS_IN;
constexpr int HALVES = 2 * TILES;  // of a stage, of 64 inputs each
constexpr int WARP_HALVES = HALVES / WARPS_IN;
static_assert(HALVES % WARPS_IN == 0 && (WARP_HALVES == 1 || WARP_HALVES % 2 == 0), "a warp takes a half tile or tiles");
static_assert(STRIPS * WARPS_OUT == 4 * TILE_BLOCKS && 4 % STRIPS == 0, "a warp's strips lie in one tile of the weight");
static_assert(!ZERO_SUMS || (SCALE_SUMS && HAS_RAW_PAIRS), "zero points are left to sums of raw pairs");
constexpr int COLUMNS = N_TILE / 8;
constexpr int X_HALF_BYTES = N_TILE * 128;
constexpr int X_BYTES = HALVES * X_HALF_BYTES;
constexpr int STAGE_BYTES = (X_BYTES + TILE_BLOCKS * TILES * TILE_BYTES + 127) / 128 * 128;
// Sums that the warps along the inputs hand over at once.
constexpr int PIECE = ACCUMULATORS < 16 ? ACCUMULATORS : 16;
// From compute capability 9.0 on, a kernel may begin before the one ahead of it has ended (see decode_triton.py).
#if __CUDA_ARCH__ >= 900
#define LAUNCH_DEPENDENTS() asm volatile("griddepcontrol.launch_dependents;")
#define WAIT_FOR_LAUNCH_BEFORE() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define LAUNCH_DEPENDENTS()
#define WAIT_FOR_LAUNCH_BEFORE()
#endif

// ---------------------------------------------------------------------------------------------- copies

// 16 bytes, or zeros instead of what lies beyond an end. No cache policy goes with a copy: where the target's address is uniform,
// CUDA's assembler (12.8 to 13.1, for sm_90) puts it into the policy's register, and the copy is an illegal instruction.
__device__ __forceinline__ void copy(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void copy_if(bool inside, u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(inside ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// What a thread copies next: a few stages ahead of what is added.
//
// Rows of x and blocks of the weight beyond the last are not copied: they meet only sums that are not stored. Inputs beyond the
// last arrive as zeros.
struct Loader {
    const u8* weight;          // this thread's first 16 bytes of the stage
    const u16* x;              // likewise
    u32 blocks, rows;          // that are there from `weight` and from `x` on
    u32 tile, k_stage, stage;  // output tile, which stage of its inputs, offset of the stage in shared memory

    static constexpr int ROWS = THREADS / 8;  // of x that all threads copy at once, in one half or in several
    static_assert(ROWS % N_TILE == 0 || N_TILE % ROWS == 0, "a thread's rows are the same in every half");

    __device__ __forceinline__ void start(const u8* all_weight, const u16* all_x, const Shape& s) {
        const Place place = place_of(tile, s);
        const u32 block = place.output_tile * TILE_BLOCKS, m = place.row_tile * N_TILE + threadIdx.x / 8 % N_TILE;
        blocks = s.weight_blocks - block, rows = s.rows - min(m, s.rows);
        weight = all_weight + (u64(block) * s.k_tiles + k_stage * TILES) * TILE_BYTES + threadIdx.x * 16;
        x = all_x + u64(m) * s.inputs + k_stage * (TILES * K_TILE) + threadIdx.x / 8 / N_TILE * 64 + threadIdx.x % 8 * 8;
    }
    __device__ __forceinline__ void advance(const u8* all_weight, const u16* all_x, const Shape& s) {
        stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        weight += TILES * TILE_BYTES, x += TILES * K_TILE;
        if (++k_stage == s.k_stages) k_stage = 0, ++tile, start(all_weight, all_x, s);
    }
    __device__ __forceinline__ bool has_all_inputs(const Shape& s) const {
        return (k_stage + 1) * (TILES * K_TILE) <= s.inputs;
    }

    __device__ __forceinline__ void copy_weight(const Shape& s, u32 shared) const {
        const u32 own = threadIdx.x * 16, target = shared + stage + X_BYTES + own;
        const u8* source = weight;
        if (has_all_inputs(s)) {
#pragma unroll
            for (int b = 0; b < TILE_BLOCKS; ++b, source += s.k_tiles * TILE_BYTES)
                if (b < blocks)
#pragma unroll
                    for (int at = 0; at < TILES * TILE_BYTES; at += THREADS * 16)
                        if (at + own < TILES * TILE_BYTES)
                            copy(target + b * TILES * TILE_BYTES + at, source + at);
            return;
        }
        const u32 left = (s.k_tiles - k_stage * TILES) * TILE_BYTES;  // to the end of a block's tiles
#pragma unroll 1
        for (int b = 0; b < TILE_BLOCKS && b < blocks; ++b, source += s.k_tiles * TILE_BYTES)
#pragma unroll 1
            for (int at = 0; at + own < TILES * TILE_BYTES; at += THREADS * 16)
                copy_if(at + own < left, target + b * TILES * TILE_BYTES + at, source + at);
    }

    // A row's 8 chunks of 16 bytes are swizzled, so that a fragment's 8 rows lie in different banks.
    __device__ __forceinline__ void copy_x(const Shape& s, u32 shared) const {
        const u32 row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        const u32 target = shared + stage + (row * 8 + (chunk ^ row % 8)) * 16;
        if (has_all_inputs(s)) {
#pragma unroll
            for (int at = 0; at < HALVES * N_TILE; at += ROWS)
                if (at + row < HALVES * N_TILE && at % N_TILE < rows)
                    copy(target + at * 128, x + at % N_TILE * s.inputs + at / N_TILE * 64);
            return;
        }
        const u32 input = k_stage * (TILES * K_TILE) + row / N_TILE * 64 + chunk * 8;
#pragma unroll 1
        for (int at = 0; at + row < HALVES * N_TILE; at += ROWS)
            if (at % N_TILE < rows)
                copy_if(input + at / N_TILE * 64 < s.inputs, target + at * 128,
                        x + at % N_TILE * s.inputs + at / N_TILE * 64);
    }
};

// ---------------------------------------------------------------------------------------------- sums

// A warp's sums [STRIPS][COLUMNS] over its part of one stage. Addresses are those of the warp's first half of it: `codes`,
// `scales` and `zeros` of its first strip, `x_low` and `x_high` this lane's row for inputs 0 .. 31 and 32 .. 63.
__device__ __forceinline__ void add_stage(float (&sums)[ACCUMULATORS], u32 codes, u32 scales, u32 zeros, u32 x_low,
                                          u32 x_high, int thread, int first_half) {
    Group groups[STRIPS];
    float group_sums[SCALE_SUMS ? ACCUMULATORS : 1], x_sums[ZERO_SUMS ? 4 * COLUMNS : 1];
#pragma unroll
    for (int h = 0; h < WARP_HALVES; ++h) {
        const int half = WARP_HALVES == 1 ? first_half : h;  // where the warp has whole tiles, h counts from one's start
        const u32 tile = WARP_HALVES == 1 ? 0 : h / 2 * TILE_BYTES;
        u32 words[STRIPS][WORDS];
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip)
            load_words(words[strip], codes + tile + half % 2 * (CODE_BYTES / 2) + strip * 512, thread + strip * 32);
#pragma unroll
        for (int quarter = 0; quarter < 2; ++quarter) {  // 32 inputs, of one group
            const int in_run = (WARP_HALVES == 1 ? 0 : h % 2 * 64) + quarter * 32;
            const int group = (half % 2 * 64 + quarter * 32) / GROUP;
            const bool begins = in_run % GROUP == 0;
            const bool ends = (in_run + 32) % GROUP == 0 || (WARP_HALVES == 1 && quarter == 1);
            u32 pairs[STRIPS][2][4];
#pragma unroll
            for (int strip = 0; strip < STRIPS; ++strip) {
                if (begins && !ZERO_SUMS)
                    groups[strip] = load_group(scales + tile + strip * 32, zeros + tile + strip * 16, group);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const u32 pair = ZERO_SUMS ? raw_pair(words[strip], quarter * 8 + i)
                                               : integer_pair(words[strip], quarter * 8 + i, groups[strip]);
                    pairs[strip][i / 4][i % 4] = SCALE_SUMS ? pair : mul(pair, groups[strip].scale_pair[i & 1]);
                }
            }
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                u32 fragment[4];
                load_matrices(fragment, (quarter == 0 ? x_low : x_high) + h * X_HALF_BYTES + column * 1024);
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const bool more = !begins || step > 0;
#pragma unroll
                    for (int strip = 0; strip < STRIPS; ++strip)
                        mma((SCALE_SUMS ? group_sums : sums) + (strip * COLUMNS + column) * 4, pairs[strip][step],
                            fragment[2 * step], fragment[2 * step + 1], !SCALE_SUMS || more);
                    const u32 ones[4] = {twice(1), twice(1), twice(1), twice(1)};
                    if (ZERO_SUMS)
                        mma(x_sums + column * 4, ones, fragment[2 * step], fragment[2 * step + 1], more);
                }
            }
            if (!SCALE_SUMS || !ends) continue;
#pragma unroll
            for (int strip = 0; strip < STRIPS; ++strip) {
                float code[2] = {groups[strip].scale[0], groups[strip].scale[1]}, zero[2] = {0, 0};
                if (ZERO_SUMS) {
                    const RawFactors factors = load_raw_factors(scales + tile + strip * 32, zeros + tile + strip * 16, group);
                    code[0] = factors.code[0], code[1] = factors.code[1];
                    zero[0] = factors.zero[0], zero[1] = factors.zero[1];
                }
#pragma unroll
                for (int i = 0; i < 4 * COLUMNS; ++i) {
                    float& sum = sums[strip * 4 * COLUMNS + i];
                    sum += code[i / 2 % 2] * group_sums[SCALE_SUMS ? strip * 4 * COLUMNS + i : 0];
                    if (ZERO_SUMS) sum -= zero[i / 2 % 2] * x_sums[ZERO_SUMS ? i : 0];
                }
            }
        }
    }
}

// Adds the sums of the warps along the inputs, always in the same order, to those of the first of them.
__device__ __forceinline__ void add_warps(float (&sums)[ACCUMULATORS], float4* exchange, int out, int in, int lane) {
    auto slot = [&](int from) { return exchange + ((from - 1) * WARPS_OUT + out) * (PIECE / 4) * 32 + lane; };
#pragma unroll
    for (int first = 0; first < ACCUMULATORS; first += PIECE) {
        if (in > 0)
#pragma unroll
            for (int i = 0; i < PIECE; i += 4)
                slot(in)[i * 8] =
                    make_float4(sums[first + i], sums[first + i + 1], sums[first + i + 2], sums[first + i + 3]);
        __syncthreads();
        if (in == 0)
#pragma unroll
            for (int from = 1; from < WARPS_IN; ++from)
#pragma unroll
                for (int i = 0; i < PIECE; i += 4) {
                    const float4 value = slot(from)[i * 8];
                    sums[first + i] += value.x, sums[first + i + 1] += value.y;
                    sums[first + i + 2] += value.z, sums[first + i + 3] += value.w;
                }
        if (first + PIECE < ACCUMULATORS) __syncthreads();  // the last piece is read before the next stage's barrier
    }
}

// ---------------------------------------------------------------------------------------------- kernel

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    quantized_matmul_mma(const u8* weight, const u16* x, u16* y, float* partials, u32* counters, Shape s) {
    extern __shared__ __align__(128) u8 memory[];
    float4* exchange = reinterpret_cast<float4*>(memory + STAGES * STAGE_BYTES);
    const u32 shared = u32(__cvta_generic_to_shared(memory));
    const u32 items = s.output_tiles() * s.row_tiles * s.k_stages;
    const u32 begin = first_item(blockIdx.x, items), end = first_item(blockIdx.x + 1, items);
    LAUNCH_DEPENDENTS();

    Loader next;
    next.tile = begin / s.k_stages, next.k_stage = begin % s.k_stages, next.stage = 0;
    next.start(weight, x, s);
#if __CUDA_ARCH__ >= 900
    {  // Weights are constants: they are fetched while the kernel before may still be writing x, or reading y.
        Loader first = next;
        for (int i = 0; i < STAGES - 1 && begin + i < end; ++i, first.advance(weight, x, s))
            first.copy_weight(s, shared);
    }
#endif
    WAIT_FOR_LAUNCH_BEFORE();
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) {
#if __CUDA_ARCH__ < 900
            next.copy_weight(s, shared);
#endif
            next.copy_x(s, shared);
            next.advance(weight, x, s);
        }
        commit_copies();
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, out = warp % WARPS_OUT, in = warp / WARPS_OUT;
    const int strip = out * STRIPS % 4, thread = strip * 32 + lane, row = strip * 16 + lane / 4 * 2;
    const u32 first_half = in * WARP_HALVES, block = out * STRIPS / 4;  // of the output tile
    // Addresses in shared memory, of the first stage.
    const u32 own_tile = shared + X_BYTES + (block * TILES + first_half / 2) * TILE_BYTES;
    const u32 own_codes = own_tile + thread * 16, own_scales = own_tile + CODE_BYTES + row * 2;
    const u32 own_zeros = own_tile + CODE_BYTES + SCALE_BYTES + row;
    // This lane's row of 8 and 16 bytes of inputs 0 .. 31 of a half; inputs 32 .. 63 lie at ^ 64.
    const u32 own_x = shared + first_half * X_HALF_BYTES + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    const u32 own_x_high = shared + first_half * X_HALF_BYTES + lane % 8 * 128 + ((lane / 8 ^ lane % 8) * 16 ^ 64);

    float sums[ACCUMULATORS];
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = 0;
    u32 stage = 0, tile = begin / s.k_stages, k = begin % s.k_stages, tile_begin = begin;
    for (u32 item = begin; item < end; ++item) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // the stage has arrived for all, and all are done with the one before, which is filled now
        if (item + STAGES - 1 < end) {
            next.copy_weight(s, shared);
            next.copy_x(s, shared);
            next.advance(weight, x, s);
        }
        commit_copies();
        add_stage(sums, own_codes + stage, own_scales + stage, own_zeros + stage, own_x + stage, own_x_high + stage,
                  thread, first_half);
        stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        if (++k < s.k_stages && item + 1 < end) continue;

        if (WARPS_IN > 1) add_warps(sums, exchange, out, in, lane);
        const bool whole = item + 1 - tile_begin == s.k_stages;
        if (in == 0 &&
            (whole || reduce(sums, partials, counters, tile, items, s.k_stages, tile_begin == begin, out, lane))) {
            const Place place = place_of(tile, s);
            const u32 n = (place.output_tile * TILE_BLOCKS + block) * 64 + row;
#pragma unroll
            for (int i = 0; i < STRIPS; ++i)
                store(*reinterpret_cast<const float(*)[4 * COLUMNS]>(sums + i * 4 * COLUMNS), y, s, place.row_tile,
                      n + 16 * i);
        }
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = 0;
        ++tile, k = 0, tile_begin = item + 1;
    }
}
