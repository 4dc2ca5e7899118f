// GPTQ on a CPU: the columns of one block, one after another, and the search for the range of a grid. Compiled at first use by
// gptq_cpu.py.
//
// Columns: round one, spread its error over those after it. Each number goes through the same operations in the same order as in
// gptq_solver.solve_block, without fused multiply-adds, so that the results are equal bit for bit. Rows do not depend on each
// other. TILE of them are solved together: their block stays in the first cache, and the compiler vectorizes over them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t TILE = 32;
constexpr int64_t LANES = 16;  // sums of a row side by side, so that their order does not depend on the processor

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

// The weighted sum of squared errors of a row's numbers on one grid.
template <bool TERNARY>
float error_of(const float* x, int64_t columns, float scale, float zero, float largest, const float* weights) {
    float sums[LANES] = {};
    const auto add = [&](int64_t column, int64_t lane) {
        float code;
        const float level = TERNARY ? ternary(x[column], scale, zero, code) : rounded(x[column], scale, zero, largest, code);
        const float error = level - x[column];
        sums[lane] += error * error * weights[column];
    };
    const int64_t whole = columns / LANES * LANES;
    for (int64_t first = 0; first < whole; first += LANES) {
        for (int64_t lane = 0; lane < LANES; ++lane) add(first + lane, lane);
    }
    for (int64_t column = whole; column < columns; ++column) add(column, column - whole);
    float sum = 0.0f;
    for (float each : sums) sum += each;
    return sum;
}

}  // namespace

// best [rows]: which of a row's candidates, scale and zero [rows][count], has the least error. x [rows] of `stride`.
extern "C" void tersor_best_grid(const float* x, int64_t stride, int64_t rows, int64_t columns, const float* scale,
                                 const float* zero, int64_t count, const float* weights, float largest, int64_t* best,
                                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float least = std::numeric_limits<float>::infinity();
        best[row] = 0;
        for (int64_t n = 0; n < count; ++n) {
            const float s = scale[row * count + n], z = zero[row * count + n];
            const float error = largest == 0.0f ? error_of<true>(x + row * stride, columns, s, z, largest, weights)
                                                : error_of<false>(x + row * stride, columns, s, z, largest, weights);
            if (error < least) {
                least = error;
                best[row] = n;
            }
        }
    }
}

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
