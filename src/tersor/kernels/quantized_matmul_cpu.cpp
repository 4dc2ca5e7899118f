// y = x · dequant(W)^T for 2-, 3-, 4- and 8-bit weights, and for bf16 and float32 ones, on a CPU. Compiled at first use by quantized_matmul_cpu.py, which
// picks the instruction set by compiler flags: the same source serves plain C++ (GCC/Clang vector types: SSE2, NEON),
// AVX2, AVX-512, AVX-512 BF16 and AMX.
//
// Layout of the packed weight. The outputs are cut into panels of 32. Inside a panel the inputs come group by group, each
// group filled up to whole blocks; a block holds the 32-bit words of 8, 16, 32 or 4 inputs at 4, 2, 3 or 8 bits:
//
//     packed[panel][block][word][32 outputs]
//
// so that a vector load gives the same inputs of 16 (8, 4) neighbouring outputs. The low half of a word holds the block's
// even inputs and the high half its odd ones, first input lowest: (word >> bits*p) then has inputs 2p and 2p+1 where a bf16
// dot product wants them. Codes are stored as two's complement, code - 2^(bits-1). With 3 bits a half word holds five values
// and one bit of the sixteenth (bit 15 of the three words). Weights that are bf16 or float32 already ("16 and 32 bits") lie
// there as they are, in one group of scale 1: four words a block, 8 or 4 inputs.
//
// Arithmetic. Integers up to 8 bits are exact in bf16 and float32, so each group's dot product is taken over integers and
// float32 sums, and only the group's sum is multiplied by its scale: no weight is ever rounded.
//
//     y[m, o] = sum_g scale[g, o] * (sum_{i in g} q[o, i] x[m, i]  -  z[g, o] * sum_{i in g} x[m, i])
//
// with q and z counted from 2^(bits-1); the second term is left out for symmetric weights. A "unit" of the inner loop is one
// input in float32, or a pair of inputs: of bf16 with AVX-512 BF16 (vdpbf16ps), of 16-bit integers with AVX2 (vpmaddwd, twice
// the products of a float32 FMA). The latter takes x in fixed point, with a step of its own for every row and stretch of a
// group: the power of two that leaves the largest |x| 14 bits and a half at least. bf16 activations within 2^-7 of the largest
// are exact in it, and the others off by 2^-15 of it at most. Float32 activations only go that way where `round_x` allows it.
//
// Up to MAX_ROWS rows of x the weights are decoded in registers and read from memory once. Above that the first rows leave
// what they decode in a tile that stays in the L1 cache, and the other rows (AMX: all rows) are multiplied with the tile.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "matmul_call.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 12;  // 12 rows x 2 vectors of sums, of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, MAX_ROWS = 6;  // 6 x 2, of 16 registers
#define INTEGER_PAIRS
#else
constexpr int LANES = 4, MAX_ROWS = 6;
#endif
constexpr int PANEL = 32, VECTORS = 2, SUBPANEL = LANES * VECTORS;
constexpr int TILE_ROWS = 6;          // rows that share a tile: 6 x 2 sums of a group and 6 x 2 of all groups
constexpr int CHUNK_UNITS = 128;      // decoded at a time: 128 * 32 * 4 bytes = 16 KiB, half an L1 cache
constexpr int MAX_STRETCHES = 16;     // of a chunk
constexpr int AHEAD = 4096;           // bytes to fetch before they are needed: a chunk of 4-bit weights
constexpr int64_t MAX_CHUNK = 512;    // rows of x at a time: bounds the sums (64 KiB a thread) and the copy of x

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(4 * LANES)));        // the halves of the 32-bit lanes
typedef int16_t vhi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh_short __attribute__((vector_size(2 * LANES)));  // one half word a lane
typedef uint8_t vb_short __attribute__((vector_size(LANES)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }
inline float bits_to_f32(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

enum Type { F32 = 0, BF16 = 1, F16 = 2 };

// ---- Decoding: what one block's words say about one unit of the inner loop

template <int BITS> struct Block {
    static constexpr int WORDS = BITS == 3 ? 3 : BITS >= 16 ? 4 : 1;
    static constexpr int INPUTS = BITS == 3 ? 32 : BITS >= 16 ? 128 / BITS : 32 / BITS;
};

// Input 2*pair + odd of the block, sign extended.
template <int BITS> inline vi decode_integer(const vu* words, int pair, int odd) {
    if (BITS == 3 && pair == 15) {  // spread over bit 15 of the three half words
        const int base = 15 + 16 * odd;
        vu code = ((words[0] >> base) & 1) | (((words[1] >> base) & 1) << 1) | (((words[2] >> base) & 1) << 2);
        return (vi)(code << 29) >> 29;
    }
    const int word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
    return (vi)(words[word] << (32 - BITS - BITS * slot - 16 * odd)) >> (32 - BITS);
}

template <int BITS> inline vf decode_f32(const vu* words, int unit) {
    if constexpr (BITS == 32) return (vf)words[unit];
    if constexpr (BITS == 16) return (vf)(unit % 2 ? words[unit / 2] & 0xffff0000u : words[unit / 2] << 16);
#ifdef __AVX512F__
    if constexpr (BITS != 8) {  // a table look-up by the low four bits of a lane saves the sign extension
        if (!(BITS == 3 && unit >= 30)) {
            alignas(64) static constexpr float table[3][16] = {
                {0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1},
                {0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1},
                {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}};
            const int pair = unit / 2, word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
            vu index = words[word] >> (BITS * slot + 16 * (unit % 2));
            return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table[BITS - 2]));
        }
    }
#endif
    if constexpr (BITS < 16) return __builtin_convertvector(decode_integer<BITS>(words, unit / 2, unit % 2), vf);
}

#ifdef __AVX512BF16__
// The bf16 numbers -2^(BITS-1) .. 2^(BITS-1) - 1 in two's complement order, repeated to 32 entries.
template <int BITS> struct Bf16Table {
    alignas(64) uint16_t entry[32];
    constexpr Bf16Table() : entry() {
        constexpr uint16_t magnitude[9] = {0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100};
        for (int i = 0; i < 32; i++) {
            int code = i & ((1 << BITS) - 1), half = 1 << (BITS - 1);
            entry[i] = code < half ? magnitude[code] : 0x8000 | magnitude[2 * half - code];
        }
    }
};

// Inputs 2*pair (low half) and 2*pair + 1 (high half) of every output as bf16.
template <int BITS> inline vu decode_bf16(const vu* words, int pair) {
    if constexpr (BITS == 16) {
        return words[pair];
    } else if constexpr (BITS == 8) {
        vu even = (vu)__builtin_convertvector(decode_integer<8>(words, pair, 0), vf);
        vu odd = (vu)__builtin_convertvector(decode_integer<8>(words, pair, 1), vf);
        return (even >> 16) | (odd & 0xffff0000u);  // exact: 8 bits fit bf16's mantissa
    } else {
        static constexpr Bf16Table<BITS> table;
        vh index;
        if (BITS == 3 && pair == 15) {
            __m512i code = (__m512i)((vh)words[2] >> 15);
            code = _mm512_shldi_epi16(code, (__m512i)words[1], 1);  // code << 1 | word >> 15
            index = (vh)_mm512_shldi_epi16(code, (__m512i)words[0], 1);
        } else {
            const int word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
            index = (vh)words[word] >> (BITS * slot);  // the look-up ignores the bits above the lowest five
        }
        return (vu)_mm512_permutexvar_epi16((__m512i)index, _mm512_load_si512(table.entry));
    }
}
#endif

#ifdef INTEGER_PAIRS
// Inputs 2*pair (low half) and 2*pair + 1 (high half) of every output as 16-bit integers.
template <int BITS> inline vu decode_int16(const vu* words, int pair) {
    if (BITS == 3 && pair == 15) {
        vh code = ((vh)words[2] & 0x8000) | (((vh)words[1] >> 15) << 14) | (((vh)words[0] >> 15) << 13);
        return (vu)((vhi)code >> 13);
    }
    const int word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
    return (vu)((vhi)((vh)words[word] << (16 - BITS - BITS * slot)) >> (16 - BITS));
}
#endif

template <int BITS, bool PAIRS> inline vu decode(const vu* words, int unit) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) return decode_bf16<BITS>(words, unit);
#elif defined(INTEGER_PAIRS)
    if constexpr (PAIRS) return decode_int16<BITS>(words, unit);
#endif
    return (vu)decode_f32<BITS>(words, unit);
}

#ifdef INTEGER_PAIRS
template <bool PAIRS> using Sum = std::conditional_t<PAIRS, vi, vf>;
#else
template <bool PAIRS> using Sum = vf;
#endif

// sum + w * x for one unit: `x` is one float32 or a pair of bf16 or of 16-bit integers, the same for all outputs. A sum of
// integers is at most 2^15 * 2^7 * 2 * CHUNK_UNITS = 2^30.
template <bool PAIRS> inline Sum<PAIRS> multiply_add(Sum<PAIRS> sum, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#elif defined(INTEGER_PAIRS)
    if constexpr (PAIRS) return sum + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32((int)x));
#endif
    if constexpr (std::is_same_v<Sum<PAIRS>, vf>) return sum + (vf)w * splat(bits_to_f32(x));
}

// The sum in units of x; x_step is that of its row where x is in fixed point.
template <bool PAIRS> inline vf in_float(Sum<PAIRS> sum, const float* x_step) {
    if constexpr (std::is_same_v<Sum<PAIRS>, vi>) return __builtin_convertvector(sum, vf) * splat(*x_step);
    else return sum;
}

// ---- Inner loops: `rows` rows of x times one stretch of one panel, added to the rows' sums

struct Stretch { int64_t group, block, blocks, unit, units; };  // part of one group
struct Chunk { int64_t first, count, unit, units; };            // stretches that are decoded together

struct Scale {  // of one group and panel, in float32
    float step[PANEL], step_times_zero[PANEL];
};

// A run of stretches decoded in registers: words [blocks][WORDS][PANEL] of the whole panel, x [units][ROWS]. With KEEP the
// decoded weights are also left in tile [units][PANEL] for further rows: the products hide most of that work. Inlined, GCC
// 12 spills: 40% slower for 3 bits.
template <int BITS, bool PAIRS, int ROWS, bool KEEP>
__attribute__((noinline)) void multiply_packed(const uint32_t* words, const uint32_t* x, const Stretch* stretches,
                                               int64_t count, const Scale* scales, const float* x_sums,
                                               const float* x_steps, int64_t x_stride, float* total, uint32_t* tile) {
    constexpr int WORDS = Block<BITS>::WORDS, UNITS = Block<BITS>::INPUTS / (PAIRS ? 2 : 1);
    constexpr int CHAINS = std::is_same_v<Sum<PAIRS>, vi> ? 1  // independent sums hide the latency of float additions
                           : ROWS == 1                    ? (UNITS < 4 ? UNITS : 4)
                           : ROWS == 2                    ? 2
                                                          : 1;
    // One row needs few registers for its sums: the whole panel at once, whose words follow each other in memory.
    constexpr int WIDE = ROWS == 1 && CHAINS == 1 && !KEEP ? PANEL / LANES : VECTORS, COLUMNS = WIDE * LANES;
    for (int column = 0; column < PANEL; column += COLUMNS) {
        const uint32_t* w = words + stretches->block * WORDS * PANEL + column;
        const uint32_t* xs = x;
        uint32_t* kept = tile + column;
        for (int64_t i = 0; i < count; i++) {
            Sum<PAIRS> sum[CHAINS][ROWS][WIDE] = {};
            for (int64_t b = 0; b < stretches[i].blocks; b++) {
                vu word[WIDE][WORDS];
#pragma GCC unroll 8
                for (int v = 0; v < WIDE; v++)
#pragma GCC unroll 3
                    for (int k = 0; k < WORDS; k++) word[v][k] = load<vu>(w + k * PANEL + v * LANES);
#pragma GCC unroll 32
                for (int u = 0; u < UNITS; u++)
#pragma GCC unroll 8
                    for (int v = 0; v < WIDE; v++) {
                        const vu weight = decode<BITS, PAIRS>(word[v], u);
                        if (KEEP) store(kept + u * PANEL + v * LANES, weight);
#pragma GCC unroll 12
                        for (int m = 0; m < ROWS; m++)
                            sum[u % CHAINS][m][v] = multiply_add<PAIRS>(sum[u % CHAINS][m][v], weight, xs[u * ROWS + m]);
                    }
                if (ROWS == 1 && BITS < 16)  // one row waits for memory
#pragma GCC unroll 4
                    for (int k = 0; k < WORDS; k++)
                        for (int line = 0; line < COLUMNS; line += 16)
                            __builtin_prefetch((const char*)(w + k * PANEL + line) + AHEAD);
                w += WORDS * PANEL, xs += UNITS * ROWS, kept += UNITS * PANEL;
            }
#pragma GCC unroll 4
            for (int c = 1; c < CHAINS; c++)
#pragma GCC unroll 2
                for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
                    for (int v = 0; v < WIDE; v++) sum[0][m][v] += sum[c][m][v];
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; v++) {
                const vf step = load<vf>(scales[i].step + column + v * LANES);
                const vf zero = load<vf>(scales[i].step_times_zero + column + v * LANES);
#pragma GCC unroll 12
                for (int m = 0; m < ROWS; m++) {
                    float* out = total + m * PANEL + column + v * LANES;
                    vf value = load<vf>(out) + step * in_float<PAIRS>(sum[0][m][v], x_steps + i * x_stride + m);
                    if (x_sums) value -= zero * splat(x_sums[i * x_stride + m]);
                    store(out, value);
                }
            }
        }
    }
}

// A run of stretches whose decoded weights are in the cache: tile [units][PANEL], x [units][ROWS]
template <bool PAIRS, int ROWS>
void multiply_tile(const uint32_t* tile, const uint32_t* x, const Stretch* stretches, int64_t count,
                   const Scale* scales, const float* x_sums, const float* x_steps, int64_t x_stride, float* total) {
    for (int column = 0; column < PANEL; column += SUBPANEL) {
        vf out[ROWS][VECTORS];
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < VECTORS; v++) out[m][v] = load<vf>(total + m * PANEL + column + v * LANES);
        const uint32_t* w = tile + column;
        const uint32_t* xs = x;
        for (int64_t i = 0; i < count; i++) {
            Sum<PAIRS> sum[ROWS][VECTORS] = {};
            for (int64_t u = 0; u < stretches[i].units; u++, w += PANEL, xs += ROWS) {
                vu weight[VECTORS];
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) weight[v] = load<vu>(w + v * LANES);
#pragma GCC unroll 12
                for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; v++) sum[m][v] = multiply_add<PAIRS>(sum[m][v], weight[v], xs[m]);
            }
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                vf step = load<vf>(scales[i].step + column + v * LANES);
#pragma GCC unroll 12
                for (int m = 0; m < ROWS; m++)
                    out[m][v] += step * in_float<PAIRS>(sum[m][v], x_steps + i * x_stride + m);
                if (!x_sums) continue;
                vf zero = load<vf>(scales[i].step_times_zero + column + v * LANES);
#pragma GCC unroll 12
                for (int m = 0; m < ROWS; m++) out[m][v] -= zero * splat(x_sums[i * x_stride + m]);
            }
        }
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < VECTORS; v++) store(total + m * PANEL + column + v * LANES, out[m][v]);
    }
}

// Compiled row counts; other counts are filled up with zero rows.
template <class F> inline void with_rows(int rows, F&& f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 6: return f(std::integral_constant<int, 6>());
        case 8: if constexpr (MAX_ROWS >= 8) return f(std::integral_constant<int, 8>()); else return;
        case 12: if constexpr (MAX_ROWS >= 12) return f(std::integral_constant<int, 12>()); else return;
    }
}

#ifdef __AMX_BF16__
constexpr int AMX_ROWS = 32;  // two 16-row tiles of x

inline void amx_configure() {
    struct alignas(64) { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } c;
    for (int t = 0; t < 8; t++) c.bytes[t] = 64, c.rows[t] = 16;
    _tile_loadconfig(&c);
}

// One stretch to tile [units][PANEL], zeros after its own units
template <int BITS> void decode_tile(const uint32_t* words, const Stretch& s, uint32_t* tile) {
    constexpr int WORDS = Block<BITS>::WORDS, UNITS = Block<BITS>::INPUTS / 2;
    std::memset(tile + s.blocks * UNITS * PANEL, 0, (s.units - s.blocks * UNITS) * PANEL * 4);
    for (int64_t b = 0; b < s.blocks; b++, words += WORDS * PANEL, tile += UNITS * PANEL)
        for (int column = 0; column < PANEL; column += SUBPANEL) {
            vu word[VECTORS][WORDS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 3
                for (int i = 0; i < WORDS; i++) word[v][i] = load<vu>(words + i * PANEL + column + v * LANES);
#pragma GCC unroll 32
            for (int u = 0; u < UNITS; u++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++)
                    store(tile + u * PANEL + column + v * LANES, decode<BITS, true>(word[v], u));
        }
}

// As multiply_tile, with x [units / 16][rows][16] and every stretch filled up to a multiple of 16 units; rows 16 or 32
void multiply_amx(const uint32_t* tile, const uint32_t* x, const Stretch* stretches, int64_t count, int rows,
                  const Scale* scales, const float* x_sums, int64_t x_sums_stride, float* total) {
    alignas(64) float sum[AMX_ROWS][PANEL];
    for (int64_t i = 0; i < count; i++) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t u = 0; u < stretches[i].units; u += 16, tile += 16 * PANEL, x += 16 * rows) {
            _tile_loadd(6, tile, PANEL * 4);
            _tile_loadd(7, tile + 16, PANEL * 4);
            _tile_loadd(4, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (rows == 16) continue;
            _tile_loadd(5, x + 256, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sum[0], PANEL * 4);
        _tile_stored(1, sum[0] + 16, PANEL * 4);
        _tile_stored(2, sum[16], PANEL * 4);
        _tile_stored(3, sum[16] + 16, PANEL * 4);
        for (int m = 0; m < rows; m++)
            for (int column = 0; column < PANEL; column += LANES) {
                float* out = total + m * PANEL + column;
                vf value = load<vf>(out) + load<vf>(sum[m] + column) * load<vf>(scales[i].step + column);
                if (x_sums)
                    value -= splat(x_sums[i * x_sums_stride + m]) * load<vf>(scales[i].step_times_zero + column);
                store(out, value);
            }
    }
}
#endif

// ---- One call

struct RowTile { int64_t first, offset; int rows, padded; };  // offset: in filled-up rows

inline vf load_scales(const void* scales, int64_t index, int type) {
    if (type == F32) return load<vf>((const float*)scales + index);
    const uint16_t* halves = (const uint16_t*)scales + index;
#ifdef __AVX512F__
    if (type == F16) return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
#endif
    vu half = __builtin_convertvector(load<vh_short>(halves), vu);
    if (type == BF16) return (vf)(half << 16);
    vf magnitude = (vf)((half & 0x7fff) << 13) * splat(0x1p112f);  // float16's exponent bias is 112 below float32's
    return (vf)((vu)magnitude | ((half & 0x8000) << 16));
}

inline void load_scale(const Call& c, int64_t panel, int64_t group, Scale& scale) {
    const int64_t index = (panel * c.groups + group) * PANEL;
    for (int column = 0; column < PANEL; column += LANES) {
        vf step = load_scales(c.scales, index + column, c.scale_type);
        store(scale.step + column, step);
        if (!c.zeros) continue;
        vi zero = __builtin_convertvector(load<vb_short>(c.zeros + index + column), vi) - (1 << (c.bits - 1));
        store(scale.step_times_zero + column, step * __builtin_convertvector(zero, vf));
    }
}

std::vector<RowTile> cut_rows(int64_t rows, int most) {
    std::vector<RowTile> tiles;
    int64_t filled = 0;
    for (int64_t first = 0; first < rows;) {
        const int left = rows - first < most ? rows - first : most;
        int padded = left <= 4 ? left : left <= 6 ? 6 : left <= 8 ? 8 : 12;
#ifdef __AMX_BF16__
        if (most == AMX_ROWS) padded = left <= 16 ? 16 : 32;
#endif
        tiles.push_back({first, filled, left, padded});
        first += left, filled += padded;
    }
    return tiles;
}

#ifdef INTEGER_PAIRS
// As pack_x below, in fixed point. An infinity or NaN makes the step NaN, and so the outputs.
template <int BITS>
void pack_fixed(const Call& c, const Stretch& s, const RowTile& tile, uint32_t* x, float* x_sums, float* x_steps) {
    const int64_t first = s.block * Block<BITS>::INPUTS, inputs = s.blocks * Block<BITS>::INPUTS;
    for (int m = 0; m < tile.padded; m++) {
        alignas(32) float row[2 * CHUNK_UNITS];
        x_sums[m] = x_steps[m] = 0;
        if (m >= tile.rows) {
            for (int64_t u = 0; u < s.units; u++) x[u * tile.padded + m] = 0;
            continue;
        }
        const uint16_t* row16 = (const uint16_t*)c.x + (tile.first + m) * c.x_stride;
        const float* row32 = (const float*)c.x + (tile.first + m) * c.x_stride;
        if (c.columns)
            for (int64_t i = 0; i < inputs; i++) {
                const int64_t k = c.columns[first + i];
                row[i] = k < 0 ? 0 : c.type == BF16 ? bits_to_f32((uint32_t)row16[k] << 16) : row32[k];
            }
        else if (c.type == BF16)
            for (int64_t i = 0; i < inputs; i++) row[i] = bits_to_f32((uint32_t)row16[first + i] << 16);
        else
            std::memcpy(row, row32 + first, 4 * inputs);
        uint32_t largest = 0;  // as integers, magnitudes are in the order of their values, with infinity and NaN on top
        for (int64_t i = 0; i < inputs; i++) {
            uint32_t magnitude;
            std::memcpy(&magnitude, row + i, 4);
            magnitude &= 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= 0x7f800000) {
            for (int64_t u = 0; u < s.units; u++) x[u * tile.padded + m] = 0;
            x_sums[m] = x_steps[m] = __builtin_nanf("");
            continue;
        }
        const uint32_t exponent = largest >> 23 < 16 ? 16 : largest >> 23;
        const float step = bits_to_f32((exponent - 14) << 23), inverse = bits_to_f32((268 - exponent) << 23);
        alignas(32) int32_t rounded[2 * CHUNK_UNITS];
        for (int64_t i = 0; i < inputs; i += LANES) {
            __m256i lanes = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(row + i), _mm256_set1_ps(inverse)));
            _mm256_store_si256((__m256i*)(rounded + i), _mm256_min_epi32(lanes, _mm256_set1_epi32(32767)));
        }
        if (c.zeros) {
            int32_t sum = 0;
            for (int64_t i = 0; i < inputs; i++) sum += rounded[i];
            x_sums[m] = step * sum;
        }
        x_steps[m] = step;
        for (int64_t u = 0; u < s.units; u++)
            x[u * tile.padded + m] = (uint32_t)(rounded[2 * u] & 0xffff) | (uint32_t)rounded[2 * u + 1] << 16;
    }
}
#endif

// Copies one row tile's share of a stretch to x [units][padded] (AMX: [units / 16][padded][16]) and sums it up.
template <int BITS, bool PAIRS>
void pack_x(const Call& c, const Stretch& s, const RowTile& tile, bool amx, uint32_t* x, float* x_sums, float* x_steps) {
#ifdef INTEGER_PAIRS
    if constexpr (PAIRS) return pack_fixed<BITS>(c, s, tile, x, x_sums, x_steps);
#endif
    constexpr int PER_UNIT = PAIRS ? 2 : 1;
    const int64_t first = s.block * Block<BITS>::INPUTS, units = s.blocks * Block<BITS>::INPUTS / PER_UNIT;
    const bool widen = !PAIRS && c.type == BF16;
    if (tile.rows < tile.padded || units < s.units) std::memset(x, 0, s.units * tile.padded * 4);
    for (int m = 0; m < tile.rows; m++) {
        const uint16_t* row16 = (const uint16_t*)c.x + (tile.first + m) * c.x_stride;
        const uint32_t* row32 = (const uint32_t*)c.x + (tile.first + m) * c.x_stride;
        auto input = [&](int64_t place) -> uint32_t {
            const int64_t k = c.columns ? c.columns[first + place] : first + place;
            if (k < 0) return 0;
            return PAIRS ? row16[k] : widen ? (uint32_t)row16[k] << 16 : row32[k];
        };
        const char* in_order = PAIRS ? (const char*)(row16 + first) : (const char*)(row32 + first);
        float sum = 0;
        for (int64_t u = 0; u < units; u++) {
            uint32_t unit;
            if (!c.columns && !widen) std::memcpy(&unit, in_order + 4 * u, 4);
            else unit = PAIRS ? input(2 * u) | input(2 * u + 1) << 16 : input(u);
            x[amx ? (u / 16 * tile.padded + m) * 16 + u % 16 : u * tile.padded + m] = unit;
            if (c.zeros) sum += PAIRS ? bits_to_f32(unit << 16) + bits_to_f32(unit & 0xffff0000u) : bits_to_f32(unit);
        }
        x_sums[m] = sum;
    }
}

void write_y(const Call& c, int64_t panel, const RowTile& tile, const float* total) {
    const int64_t column = panel * PANEL, width = c.outputs - column < PANEL ? c.outputs - column : PANEL;
    for (int m = 0; m < tile.rows; m++, total += PANEL) {
        const int64_t index = (tile.first + m) * c.outputs + column;
        if (c.type == F32) {
            std::memcpy((float*)c.y + index, total, width * 4);
            continue;
        }
        uint16_t rounded[PANEL];
        for (int n = 0; n < PANEL; n += LANES) {
            const vf value = load<vf>(total + n);
            const vu bits = (vu)value;
            const vu nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
            const vu result = value == value ? nearest : (vu{} + 0x7fc0);
            store(rounded + n, __builtin_convertvector(result, vh_short));
        }
        std::memcpy((uint16_t*)c.y + index, rounded, width * 2);
    }
}

// Groups cut into stretches, and these gathered into chunks that fit the cache when decoded.
template <int BITS, bool PAIRS>
void cut_inputs(const Call& c, bool amx, std::vector<Stretch>& stretches, std::vector<Chunk>& chunks) {
    constexpr int UNITS = Block<BITS>::INPUTS / (PAIRS ? 2 : 1), MAX_BLOCKS = CHUNK_UNITS / UNITS;
    int64_t unit = 0;
    for (int64_t g = 0; g < c.groups; g++)
        for (int64_t b = c.starts[g]; b < c.starts[g + 1]; b += MAX_BLOCKS) {
            const int64_t blocks = c.starts[g + 1] - b < MAX_BLOCKS ? c.starts[g + 1] - b : MAX_BLOCKS;
            const int64_t units = amx ? (blocks * UNITS + 15) / 16 * 16 : blocks * UNITS;
            if (chunks.empty() || chunks.back().units + units > CHUNK_UNITS || chunks.back().count == MAX_STRETCHES)
                chunks.push_back({(int64_t)stretches.size(), 0, unit, 0});
            stretches.push_back({g, b, blocks, unit, units});
            chunks.back().count++, chunks.back().units += units, unit += units;
        }
}

template <int BITS, bool PAIRS> bool run(const Call& c) {
    constexpr int WORDS = Block<BITS>::WORDS;
    const bool in_registers = c.rows <= MAX_ROWS;
    bool amx = false;
    int most = in_registers ? MAX_ROWS : TILE_ROWS;
#ifdef __AMX_BF16__
    amx = PAIRS && !in_registers;
    if (amx) most = AMX_ROWS;
#endif
    const std::vector<RowTile> tiles = cut_rows(c.rows, most);
    std::vector<Stretch> stretches;
    std::vector<Chunk> chunks;
    cut_inputs<BITS, PAIRS>(c, amx, stretches, chunks);

    const int64_t rows = tiles.back().offset + tiles.back().padded, count = stretches.size();
    const int64_t panels = (c.outputs + PANEL - 1) / PANEL, blocks = c.starts[c.groups];
    auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
    const int64_t x_size = aligned(chunks.empty() ? 0 : (chunks.back().unit + chunks.back().units) * rows);
    const int64_t sums_size = aligned(count * rows), total_size = rows * PANEL;
    float* memory = (float*)std::aligned_alloc(64, 4 * (x_size + 2 * sums_size + c.threads * total_size));
    if (!memory) return false;
    uint32_t* x = (uint32_t*)memory;
    float *x_sums = memory + x_size, *x_steps = x_sums + sums_size;

    auto pack = [&](const Chunk& chunk) {
        for (const RowTile& tile : tiles)
            for (int64_t i = chunk.first; i < chunk.first + chunk.count; i++)
                pack_x<BITS, PAIRS>(c, stretches[i], tile, amx,
                                    x + chunk.unit * rows + chunk.units * tile.offset +
                                        (stretches[i].unit - chunk.unit) * tile.padded,
                                    x_sums + i * rows + tile.offset, x_steps + i * rows + tile.offset);
    };
    const bool pack_before = x_size <= 8192;  // not worth a barrier, where threads may wait for each other
    if (pack_before)
        for (const Chunk& chunk : chunks) pack(chunk);

#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
#ifdef _OPENMP
        float* total = x_steps + sums_size + omp_get_thread_num() * total_size;
#else
        float* total = x_steps + sums_size;
#endif
        alignas(64) uint32_t decoded[CHUNK_UNITS * PANEL];
        Scale scales[MAX_STRETCHES];
#ifdef __AMX_BF16__
        if (amx) amx_configure();
#endif
        if (!pack_before) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (int64_t)chunks.size(); i++) pack(chunks[i]);
        }
#pragma omp for schedule(dynamic, in_registers ? 4 : 1) nowait
        for (int64_t panel = 0; panel < panels; panel++) {
            const uint32_t* panel_words = c.packed + panel * blocks * WORDS * PANEL;
            std::memset(total, 0, total_size * 4);
            for (const Chunk& chunk : chunks) {
                const Stretch* s = &stretches[chunk.first];
                for (int64_t i = 0; i < chunk.count; i++) {
                    load_scale(c, panel, s[i].group, scales[i]);
#ifdef __AMX_BF16__
                    if constexpr (PAIRS) {  // dense float32, which has no pairs, must not be compiled for them
                        const uint32_t* words = panel_words + s[i].block * WORDS * PANEL;
                        if (amx) decode_tile<BITS>(words, s[i], decoded + (s[i].unit - chunk.unit) * PANEL);
                    }
#endif
                }
                const int64_t last = s[chunk.count - 1].block + s[chunk.count - 1].blocks;
                const char* next = (const char*)(panel_words + last * WORDS * PANEL);
                const int64_t share = in_registers ? 0 : (last - s->block) * WORDS * PANEL * 4 / tiles.size();
                for (const RowTile& tile : tiles) {
                    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 2);
                    next += share;
                    const uint32_t* xs = x + chunk.unit * rows + chunk.units * tile.offset;
                    const float* sums = c.zeros ? x_sums + chunk.first * rows + tile.offset : nullptr;
                    const float* steps = x_steps + chunk.first * rows + tile.offset;
                    float* out = total + tile.offset * PANEL;
#ifdef __AMX_BF16__
                    if (amx) {
                        multiply_amx(decoded, xs, s, chunk.count, tile.padded, scales, sums, rows, out);
                        continue;
                    }
#endif
                    if (!in_registers && tile.first == 0) {
                        multiply_packed<BITS, PAIRS, TILE_ROWS, true>(panel_words, xs, s, chunk.count, scales, sums,
                                                                      steps, rows, out, decoded);
                        continue;
                    }
                    with_rows(tile.padded, [&](auto number) {
                        constexpr int ROWS = decltype(number)::value;
                        if (in_registers)
                            multiply_packed<BITS, PAIRS, ROWS, false>(panel_words, xs, s, chunk.count, scales, sums,
                                                                      steps, rows, out, decoded);
                        else if constexpr (ROWS <= TILE_ROWS)
                            multiply_tile<PAIRS, ROWS>(decoded, xs, s, chunk.count, scales, sums, steps, rows, out);
                    });
                }
            }
            for (const RowTile& tile : tiles) write_y(c, panel, tile, total + tile.offset * PANEL);
        }
#ifdef __AMX_BF16__
        if (amx) _tile_release();
#endif
    }
    std::free(memory);
    return true;
}

template <bool PAIRS> bool run_bits(const Call& c) {
    switch (c.bits) {
        case 2: return run<2, PAIRS>(c);
        case 3: return run<3, PAIRS>(c);
        case 4: return run<4, PAIRS>(c);
        case 8: return run<8, PAIRS>(c);
#ifdef INTEGER_PAIRS
        case 16: return run<16, false>(c);
#else
        case 16: return run<16, PAIRS>(c);
#endif
        case 32: return run<32, false>(c);
    }
    return false;
}

// ---- Repacking: GPTQ's words [inputs * bits / 32, outputs] to the layout above, and back

template <int BITS> inline uint32_t get_gptq(const uint32_t* words, int64_t outputs, int64_t k) {
    const int64_t word = k * BITS / 32 * outputs;
    const int shift = k * BITS % 32;
    uint32_t code = words[word] >> shift;
    if (shift + BITS > 32) code |= words[word + outputs] << (32 - shift);
    return code & ((1u << BITS) - 1);
}

template <int BITS> inline void put_gptq(uint32_t* words, int64_t outputs, int64_t k, uint32_t code) {
    const int64_t word = k * BITS / 32 * outputs;
    const int shift = k * BITS % 32;
    words[word] |= code << shift;
    if (shift + BITS > 32) words[word + outputs] |= code >> (32 - shift);
}

template <int BITS> inline uint32_t get_block(const uint32_t* words, int k) {
    const int pair = k / 2, half = 16 * (k % 2);
    if (BITS == 3 && pair == 15) {
        uint32_t code = 0;
        for (int i = 0; i < 3; i++) code |= ((words[i * PANEL] >> (15 + half)) & 1) << i;
        return code;
    }
    const int word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
    return (words[word * PANEL] >> (BITS * slot + half)) & ((1u << BITS) - 1);
}

template <int BITS> inline void put_block(uint32_t* words, int k, uint32_t code) {
    const int pair = k / 2, half = 16 * (k % 2);
    if (BITS == 3 && pair == 15) {
        for (int i = 0; i < 3; i++) words[i * PANEL] |= ((code >> i) & 1) << (15 + half);
        return;
    }
    const int word = BITS == 3 ? pair / 5 : 0, slot = BITS == 3 ? pair % 5 : pair;
    words[word * PANEL] |= code << (BITS * slot + half);
}

template <int BITS>
void repack(uint32_t* gptq, uint32_t* packed, const int32_t* columns, int64_t blocks, int64_t outputs, int threads,
            bool back) {
    constexpr int WORDS = Block<BITS>::WORDS, INPUTS = Block<BITS>::INPUTS;
    constexpr uint32_t SIGN = 1u << (BITS - 1);
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < blocks * INPUTS; i++) {
            const int64_t k = columns ? columns[i] : i;
            if (k < 0) continue;
            uint32_t* block = packed + (panel * blocks + i / INPUTS) * WORDS * PANEL;
            for (int64_t n = 0; n < PANEL && panel * PANEL + n < outputs; n++) {
                uint32_t* column = gptq + panel * PANEL + n;
                if (back) put_gptq<BITS>(column, outputs, k, get_block<BITS>(block + n, i % INPUTS) ^ SIGN);
                else put_block<BITS>(block + n, i % INPUTS, get_gptq<BITS>(column, outputs, k) ^ SIGN);
            }
        }
}
}  // namespace

extern "C" {

// 0, or -1 where memory is short
int tersor_matmul(const Call* call) {
    for (int64_t first = 0; first < call->rows; first += MAX_CHUNK) {
        Call c = *call;
        const int64_t size = c.type == F32 ? 4 : 2;
        c.x = (const char*)c.x + first * c.x_stride * size;
        c.y = (char*)c.y + first * c.outputs * size;
        if (c.rows - first < MAX_CHUNK) c.rows -= first;
        else c.rows = MAX_CHUNK;
#if defined(__AVX512BF16__)
        bool done = c.type == BF16 ? run_bits<true>(c) : run_bits<false>(c);
#elif defined(INTEGER_PAIRS)
        bool done = c.type == BF16 || c.round_x ? run_bits<true>(c) : run_bits<false>(c);
#else
        bool done = run_bits<false>(c);
#endif
        if (!done) return -1;
    }
    return 0;
}

// Both destinations must hold zeros before.
void tersor_repack(uint32_t* gptq, uint32_t* packed, const int32_t* columns, int64_t blocks, int64_t outputs, int bits,
                   int threads, int back) {
    switch (bits) {
        case 2: return repack<2>(gptq, packed, columns, blocks, outputs, threads, back);
        case 3: return repack<3>(gptq, packed, columns, blocks, outputs, threads, back);
        case 4: return repack<4>(gptq, packed, columns, blocks, outputs, threads, back);
        case 8: return repack<8>(gptq, packed, columns, blocks, outputs, threads, back);
    }
}
}
