// GPTQ's loop over the columns of one block, for many rows at once (compress/gptq_solver.py says what is computed).
//
// Four neighbouring threads work on a row; thread `lane` of them holds the columns 4 c + lane. The columns are taken four at a
// time: each is rounded, the other three of its four are brought up to date at once, and what lies behind them once for all
// four. There the registers move on by one, so that the columns in turn always lie in w[0] and the loop need not be unrolled.
// A block of fewer than 128 columns is filled up with columns of zeros.

#define WIDTH 128
#define STEPS (WIDTH / 4)

extern "C" __global__ void __launch_bounds__(128) gptq_block(
    const float* __restrict__ W,      // [rows, width], rows w_stride apart
    const float* __restrict__ U,      // [width, width], upper triangular, rows u_stride apart
    const float* __restrict__ scale,  // [rows, width]
    const float* __restrict__ zero,   // [rows, width]; of a ternary grid the negative level
    unsigned char* __restrict__ codes,  // [rows, width]
    float* __restrict__ errors,         // [rows, width]
    long long w_stride, long long u_stride, int rows, int width, int levels, int ternary)
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
    const float* mine = W + (there ? row : 0) * w_stride;
    const long long place = (long long)(there ? row : 0) * width;
    float w[STEPS];
#pragma unroll
    for (int c = 0; c < STEPS; c++) w[c] = there && 4 * c + lane < width ? mine[4 * c + lane] : 0.0f;

    float next_scale = lane < width ? scale[place + lane] : 1.0f;
    float next_zero = lane < width ? zero[place + lane] : 0.0f;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        const int column = 4 * step + lane, later = column + 4;
        const float my_scale = next_scale, my_zero = next_zero;
        next_scale = later < width ? scale[place + later] : 1.0f;
        next_zero = later < width ? zero[place + later] : 0.0f;
        const float4* us = u + step * STEPS * 4 + lane;
        const float4 here = us[0];
        const float among[4] = {here.x, here.y, here.z, here.w};
        float error[4], my_code = 0.0f;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            // The thread that holds the column rounds it; the others go through the same motions on theirs.
            float code, level;
            if (ternary) {
                code = 1.0f + (w[0] > my_scale * 0.5f) - (w[0] < my_zero * 0.5f);
                level = code == 2.0f ? my_scale : code == 0.0f ? my_zero : 0.0f;
            } else {
                code = fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(w[0], my_scale)), my_zero), 0.0f), levels - 1.0f);
                level = __fmul_rn(my_scale, __fsub_rn(code, my_zero));
            }
            const float my_error = __fdiv_rn(__fsub_rn(w[0], level), among[s]);
            if (lane == s) my_code = code;
            error[s] = __shfl_sync(0xffffffffu, my_error, s, 4);
            w[0] = fmaf(-error[s], among[s], w[0]);  // for lanes before s among[s] is 0: U is upper triangular
        }
        if (there && column < width) {
            codes[place + column] = (unsigned char)my_code;
            errors[place + column] = lane == 0 ? error[0] : lane == 1 ? error[1] : lane == 2 ? error[2] : error[3];
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
}
