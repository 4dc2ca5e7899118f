// GPTQ's loop over the columns of one block, for many rows at once (compress/gptq_solver.py says what is computed), and before
// it the grids of the groups that begin in the block, as formats/grid.py fits them, where GROUP is not 0.
//
// Four neighbouring threads work on a row; thread `lane` of them holds the columns 4 c + lane. The columns are taken four at a
// time: each is rounded, the other three of its four are brought up to date at once, and what lies behind them once for all
// four. There the registers move on by one, so that the columns in turn always lie in w[0] and the loop need not be unrolled.
// A block of fewer than 128 columns is filled up with columns of zeros.
//
// Defined in front of this file: LEVELS of a grid; TERNARY, SYM (0 or 1); GROUP, columns of a group; STORED, what a file keeps
// of a step (0: everything, 1: float16, 2: bfloat16, 3: float32); MIN_ZERO, the smallest zero point that it can hold.
// Sums and products that decide a level are rounded one by one, as torch does it: no multiply-add takes two of them together.

#define WIDTH 128
#define STEPS (WIDTH / 4)

__device__ __forceinline__ float as_stored(float step) {
    if (STORED == 0) return step;
    if (step == 0.0f) return 0.0f;
    const float tiny = STORED == 1 ? 6.103515625e-05f : 1.17549435e-38f;
    const float largest = STORED == 1 ? 65504.0f : STORED == 2 ? 3.38953139e+38f : 3.40282347e+38f;
    float size = fminf(fmaxf(fabsf(step), tiny), largest);
    if (STORED == 1) {
        unsigned short half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(size));
        asm("cvt.f32.f16 %0, %1;" : "=f"(size) : "h"(half));
    } else if (STORED == 2) {
        const unsigned bits = __float_as_uint(size);
        size = __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    }
    return step < 0.0f ? -size : size;
}

struct Grid {
    float scale, zero;  // of a ternary grid the positive and the negative level
};

// From the smallest and the largest of a row's numbers and 0.
__device__ __forceinline__ Grid grid_of(float low, float high) {
    if (SYM) {
        high = fmaxf(fabsf(low), high);
        const float mirrored = TERNARY && STORED ? -high : low;
        low = low < 0.0f ? -high : mirrored;
    }
    if (low == 0.0f && high == 0.0f) low = -1.0f, high = 1.0f;
    if (TERNARY) return {as_stored(high), as_stored(low)};
    const float largest = LEVELS - 1.0f;
    float scale = as_stored(__fdiv_rn(__fsub_rn(high, low), largest));
    if (SYM) return {scale, LEVELS * 0.5f};
    float zero = fminf(fmaxf(rintf(__fdiv_rn(-low, scale)), 0.0f), largest);
    if (STORED && MIN_ZERO > 0 && zero < MIN_ZERO) {
        scale = as_stored(__fdiv_rn(high, largest - MIN_ZERO));
        zero = MIN_ZERO;
    }
    return {scale, zero};
}

extern "C" __global__ void __launch_bounds__(128) gptq_block(
    const float* __restrict__ now,       // [rows, width], W as the blocks before this one left it
    const float* __restrict__ U,         // [width, width], upper triangular
    const float* __restrict__ original,  // [rows, width], W as it was
    float* scales, float* zeros,         // [rows, groups]
    const int* __restrict__ group_of,    // [width]
    unsigned char* __restrict__ codes,   // [rows, width]
    float* __restrict__ moved,           // [rows, width], W as it was less its level
    float* __restrict__ errors,          // [rows], to which (w - q)^2 / (2 U_ii^2) is added
    long long now_stride, long long u_stride, long long original_stride, long long codes_stride, long long moved_stride,
    int rows, int width, int groups)
{
    // u[step][ahead][lane] holds U of the four columns of `step` against column 4 (step + ahead) + lane.
    extern __shared__ float4 u[];
    float* flat = reinterpret_cast<float*>(u);
    for (int i = threadIdx.x; i < WIDTH * WIDTH; i += blockDim.x) {
        const int s = i % 4, lane = i / 4 % 4, ahead = i / 16 % STEPS, step = i / (16 * STEPS);
        const int from = 4 * step + s, to = 4 * (step + ahead) + lane;
        const bool inside = from < width && to < width;
        flat[i] = inside ? U[from * u_stride + to] : from == to ? 1.0f : 0.0f;
    }
    __syncthreads();

    const int lane = threadIdx.x % 4, row = blockIdx.x * (blockDim.x / 4) + threadIdx.x / 4;
    const bool there = row < rows;
    const long long r = there ? row : 0;
    now += r * now_stride, original += r * original_stride, codes += r * codes_stride, moved += r * moved_stride;
    scales += r * groups, zeros += r * groups;
    float w[STEPS];
#pragma unroll
    for (int c = 0; c < STEPS; c++) w[c] = there && 4 * c + lane < width ? now[4 * c + lane] : 0.0f;

#if GROUP > 0
#pragma unroll
    for (int first = 0; first < WIDTH; first += GROUP) {
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int c = first / 4; c < (first + GROUP) / 4; c++) low = fminf(low, w[c]), high = fmaxf(high, w[c]);
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            low = fminf(low, __shfl_xor_sync(0xffffffffu, low, distance));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, distance));
        }
        if (there && first < width) {  // all four write the same, so that each can read what it wrote
            const Grid grid = grid_of(low, high);
            scales[group_of[first]] = grid.scale;
            zeros[group_of[first]] = grid.zero;
        }
    }
#endif

    float next_scale = lane < width ? scales[group_of[lane]] : 1.0f;
    float next_zero = lane < width ? zeros[group_of[lane]] : 0.0f;
    float total = 0.0f;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        const int column = 4 * step + lane, later = column + 4;
        const float scale = next_scale, zero = next_zero;
        next_scale = later < width ? scales[group_of[later]] : 1.0f;
        next_zero = later < width ? zeros[group_of[later]] : 0.0f;
        const float4* us = u + step * STEPS * 4 + lane;
        const float4 here = us[0];
        const float among[4] = {here.x, here.y, here.z, here.w};
        float error[4], my_code = 0.0f, my_level = 0.0f, my_error = 0.0f;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            // The thread that holds the column rounds it; the others go through the same motions on theirs.
            float code, level;
            if (TERNARY) {
                code = 1.0f + (w[0] > scale * 0.5f) - (w[0] < zero * 0.5f);
                level = code == 2.0f ? scale : code == 0.0f ? zero : 0.0f;
            } else {
                code = fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(w[0], scale)), zero), 0.0f), LEVELS - 1.0f);
                level = __fmul_rn(scale, __fsub_rn(code, zero));
            }
            const float candidate = __fdiv_rn(__fsub_rn(w[0], level), among[s]);
            if (lane == s) my_code = code, my_level = level, my_error = candidate;
            error[s] = __shfl_sync(0xffffffffu, candidate, s, 4);
            w[0] = fmaf(-error[s], among[s], w[0]);  // for lanes before s among[s] is 0: U is upper triangular
        }
        if (there && column < width) {
            codes[column] = (unsigned char)my_code;
            moved[column] = __fsub_rn(original[column], my_level);
            total = fmaf(my_error, 0.5f * my_error, total);
        }
#pragma unroll
        for (int c = 1; c < STEPS; c++) {
            const float4 ahead = us[4 * c];
            float value = fmaf(-error[0], ahead.x, w[c]);
            value = fmaf(-error[1], ahead.y, value);
            value = fmaf(-error[2], ahead.z, value);
            w[c - 1] = fmaf(-error[3], ahead.w, value);
        }
        w[STEPS - 1] = 0.0f;
    }
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (there && lane == 0) errors[row] += total;
}
