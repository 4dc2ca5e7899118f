// The columns of one block of GPTQ on a CPU, one after another: round a column, spread its error over those after it. Compiled at
// first use by gptq_block_cpu.py. Each number goes through the same operations in the same order as in gptq_solver.solve_columns,
// without fused multiply-adds, so that the results are equal bit for bit.
//
// Rows do not depend on each other. TILE of them are solved together: their block stays in the first cache, and the compiler
// vectorizes over them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t TILE = 32;

struct Block {
    const float *W, *U, *scale, *zero;  // W, scale, zero [width][rows], U [width][width]
    int64_t width, rows;
    float largest;  // code; 0: ternary
    uint8_t* codes;
    float *levels, *errors;  // codes, levels [width][rows], errors [rows]
};

inline float rounded(float x, float scale, float zero, float largest, float& code) {
    code = std::min(std::max(std::rint(x / scale) + zero, 0.0f), largest);
    return scale * (code - zero);
}

inline float ternary(float x, float high, float low, float& code) {
    code = 1.0f + (x > high / 2 ? 1.0f : 0.0f) - (x < low / 2 ? 1.0f : 0.0f);
    return code == 2.0f ? high : (code == 0.0f ? low : 0.0f);
}

// w: room for [width][TILE]
template <bool TERNARY>
void solve(const Block& block, int64_t first, float* w) {
    const int64_t count = std::min(TILE, block.rows - first);
    float error[TILE] = {};
    for (int64_t i = 0; i < block.width; ++i) {
        std::copy_n(block.W + i * block.rows + first, count, w + i * TILE);
        std::fill(w + i * TILE + count, w + (i + 1) * TILE, 0.0f);
    }
    for (int64_t i = 0; i < block.width; ++i) {
        const int64_t at = i * block.rows + first;
        const float *scale = block.scale + at, *zero = block.zero + at, *row = block.U + i * block.width;
        float* now = w + i * TILE;
        const float pivot = row[i];
        for (int64_t r = 0; r < count; ++r) {
            float code;
            const float level =
                TERNARY ? ternary(now[r], scale[r], zero[r], code) : rounded(now[r], scale[r], zero[r], block.largest, code);
            block.codes[at + r] = (uint8_t)code;
            block.levels[at + r] = level;
            error[r] = (now[r] - level) / pivot;
        }
        for (int64_t r = 0; r < count; ++r) block.errors[first + r] += error[r] * error[r] / 2;
        for (int64_t j = i + 1; j < block.width; ++j) {
            float* later = w + j * TILE;
            for (int64_t r = 0; r < TILE; ++r) later[r] -= row[j] * error[r];
        }
    }
}

}  // namespace

extern "C" void tersor_gptq_block(const float* W, const float* U, const float* scale, const float* zero, int64_t width,
                                  int64_t rows, float largest, uint8_t* codes, float* levels, float* errors, int threads) {
    const Block block{W, U, scale, zero, width, rows, largest, codes, levels, errors};
    const int64_t tiles = (rows + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(width * TILE);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            if (largest == 0.0f) {
                solve<true>(block, tile * TILE, room.data());
            } else {
                solve<false>(block, tile * TILE, room.data());
            }
        }
    }
}
