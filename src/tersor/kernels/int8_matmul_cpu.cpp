// y = round8(x) · W^T on a CPU: rows of x rounded to 8 bits, times 8-bit weights, summed in 32-bit integers. Compiled at first use
// by int8_matmul_cpu.py; the same source serves plain C++, AVX2, AVX-512 and AVX-512 VNNI. int8_matmul.py has the definition, and
// the results are equal to it bit for bit: sums of integers do not depend on their order.
//
// Layout of the weight. The outputs are cut into panels of 16, the inputs into pairs:
//
//     packed[panel][pair][16 outputs][2]      int8
//
// A panel's pair is loaded as 16-bit integers, 16 (8, 4) outputs at a time, and meets one pair of x, the same for all outputs:
// vpmaddwd adds the two products to a 32-bit lane without loss. vpmaddubsw would take twice as many products, but its 16-bit sums
// saturate, and -128 has no counterpart to take the sign of.
//
// x is rounded and packed once, tile by tile of up to ROWS rows: x[tile][pair][rows]. A thread takes a panel and goes over the
// inputs in stretches whose weights and tile of x both fit the L1 cache.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16, ROWS = 12;  // 12 rows x 2 vectors of sums, of 32 registers
typedef __m512i vi;
inline vi load_pairs(const int8_t* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }
inline vi same(int32_t x) { return _mm512_set1_epi32(x); }
inline vi multiply_add(vi sum, vi w, vi x) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, w, x);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;  // 6 x 2, of 16 registers
typedef __m256i vi;
inline vi load_pairs(const int8_t* w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)); }
inline vi same(int32_t x) { return _mm256_set1_epi32(x); }
// The sum is written out: given the intrinsic, GCC 12 makes all products of a pair before it adds them, for which there are not
// enough registers, and takes 1.5 times as long.
inline vi multiply_add(vi sum, vi w, vi x) {
    const vi product = _mm256_madd_epi16(w, x);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
}
#else
constexpr int LANES = 4, ROWS = 4;
typedef int32_t vi __attribute__((vector_size(16)));
inline vi load_pairs(const int8_t* w) {
    vi pairs;
    for (int n = 0; n < 4; n++) pairs[n] = (int32_t)((uint32_t)(uint16_t)w[2 * n] | (uint32_t)(uint16_t)w[2 * n + 1] << 16);
    return pairs;
}
inline vi same(int32_t x) { return x - vi{}; }
inline vi multiply_add(vi sum, vi w, vi x) { return sum + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16); }
#endif

constexpr int PANEL = 16, VECTORS = 2, COLUMNS = VECTORS * LANES;
constexpr int GROUP = 32;             // outputs that a thread takes at a time: a multiple of PANEL and of COLUMNS
constexpr int64_t STRETCH = 512;      // pairs of inputs: 16 KiB of weights beside 12 KiB of x
constexpr int64_t MAX_CHUNK = 516;    // rows of x at a time: bounds the memory for sums and for x; a multiple of ROWS

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

enum Type { F32 = 0, BF16 = 1 };

struct Call {
    const void* x;          // [rows, inputs] of `type`
    int64_t x_stride;       // elements between rows
    void* y;                // [rows, outputs] of `type`, contiguous
    int64_t rows, inputs, outputs;
    const int8_t* packed;   // [panels, pairs, PANEL, 2], an even number of panels
    const float* scales;    // [outputs filled up to whole panels]
    int type, threads;
};

inline float bf16_to_f32(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
}

// Rounds one row of x to whole numbers -128 .. 127 and returns its step; those of a row that is not finite are 0, its step is NaN.
float round_row(const Call& c, int64_t row, float* wide, int16_t* codes) {
    const float* values = (const float*)c.x + row * c.x_stride;
    if (c.type == BF16) {
        const uint16_t* halves = (const uint16_t*)c.x + row * c.x_stride;
        for (int64_t i = 0; i < c.inputs; i++) wide[i] = bf16_to_f32(halves[i]);
        values = wide;
    }
    uint32_t largest = 0;  // as integers, magnitudes are in the order of their values, with infinity and NaN on top
    for (int64_t i = 0; i < c.inputs; i++) {
        uint32_t magnitude;
        std::memcpy(&magnitude, values + i, 4);
        magnitude &= 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float peak;
    std::memcpy(&peak, &largest, 4);
    const float step = peak / 127.5f;
    if (largest >= 0x7f800000 || step == 0) {
        std::memset(codes, 0, 2 * c.inputs);
        return largest >= 0x7f800000 ? __builtin_nanf("") : 1.0f;
    }
    for (int64_t i = 0; i < c.inputs; i++) {
        float code = __builtin_nearbyintf(values[i] / step);
        code = code > 127.0f ? 127.0f : code;
        codes[i] = (int16_t)(code < -128.0f ? -128.0f : code);
    }
    return step;
}

// sums [rows][PANEL or COLUMNS, whichever is wider] += x [pairs][rows] times weights of COLUMNS outputs
template <int N>
void multiply(const int8_t* w, int64_t panel_bytes, const int32_t* x, int64_t pairs, int32_t* sums) {
    vi sum[N][VECTORS];
    for (int m = 0; m < N; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = load<vi>(sums + m * GROUP + v * LANES);
    for (int64_t p = 0; p < pairs; p++, w += 2 * PANEL, x += N) {
        vi weight[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weight[v] = load_pairs(w + v * LANES / PANEL * panel_bytes + v * LANES % PANEL * 2);
#pragma GCC unroll 12
        for (int m = 0; m < N; m++) {
            const vi pair = same(x[m]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[m][v] = multiply_add(sum[m][v], weight[v], pair);
        }
    }
    for (int m = 0; m < N; m++)
        for (int v = 0; v < VECTORS; v++) store(sums + m * GROUP + v * LANES, sum[m][v]);
}

inline int filled(int rows) { return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : 12; }  // rows that are compiled

template <class F> inline void with_rows(int rows, F&& f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 6: if constexpr (ROWS >= 6) return f(std::integral_constant<int, 6>()); else return;
        case 8: if constexpr (ROWS >= 8) return f(std::integral_constant<int, 8>()); else return;
        case 12: if constexpr (ROWS >= 12) return f(std::integral_constant<int, 12>()); else return;
    }
}

void write_y(const Call& c, int64_t first, const int32_t* sums, const float* steps) {
    const int64_t width = c.outputs - first < GROUP ? c.outputs - first : GROUP;
    for (int64_t m = 0; m < c.rows; m++)
        for (int64_t n = 0; n < width; n++) {
            const float value = (float)sums[m * GROUP + n] * steps[m] * c.scales[first + n];
            const int64_t index = m * c.outputs + first + n;
            if (c.type == F32) ((float*)c.y)[index] = value;
            else ((uint16_t*)c.y)[index] = f32_to_bf16(value);
        }
}

bool run(const Call& c) {
    const int64_t pairs = (c.inputs + 1) / 2, tiles = (c.rows + ROWS - 1) / ROWS, groups = (c.outputs + GROUP - 1) / GROUP;
    const int64_t panel_bytes = pairs * PANEL * 2, padded = (tiles - 1) * ROWS + filled((int)(c.rows - (tiles - 1) * ROWS));
    auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
    const int64_t x_size = aligned(padded * pairs), sums_size = padded * GROUP, row_size = aligned(c.inputs + pairs);
    char* memory = (char*)std::aligned_alloc(64, 4 * (x_size + aligned(padded) + c.threads * (sums_size + row_size)));
    if (!memory) return false;
    int32_t* x = (int32_t*)memory;
    float* steps = (float*)(x + x_size);
    int32_t* own = (int32_t*)(steps + aligned(padded));
    auto pack_row = [&](int64_t row, float* wide, int16_t* codes) {
        const int64_t tile = row / ROWS, start = tile * ROWS, n = start + ROWS < padded ? ROWS : padded - start;
        int32_t* to = x + start * pairs + (row - start);
        if (row < c.rows) steps[row] = round_row(c, row, wide, codes);
        else std::memset(codes, 0, 2 * c.inputs);
        codes[2 * pairs - 1] = c.inputs % 2 ? 0 : codes[2 * pairs - 1];
        for (int64_t p = 0; p < pairs; p++) std::memcpy(to + p * n, codes + 2 * p, 4);
    };
    const bool pack_before = padded <= ROWS;  // not worth a barrier, where threads may wait for each other
    if (pack_before) {
        float* wide = (float*)(own + sums_size);
        for (int64_t row = 0; row < padded; row++) pack_row(row, wide, (int16_t*)(wide + c.inputs));
    }
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
#ifdef _OPENMP
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        int32_t* sums = own + thread * (sums_size + row_size);
        float* wide = (float*)(sums + sums_size);
        int16_t* codes = (int16_t*)(wide + c.inputs);
        if (!pack_before) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < padded; row++) pack_row(row, wide, codes);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t group = 0; group < groups; group++) {
            std::memset(sums, 0, 4 * sums_size);
            const int8_t* w = c.packed + group * (GROUP / PANEL) * panel_bytes;
            for (int column = 0; column < GROUP; column += COLUMNS) {
                const int8_t* panel = w + column / PANEL * panel_bytes + column % PANEL * 2;
                for (int64_t p = 0; p < pairs; p += STRETCH) {
                    const int64_t count = pairs - p < STRETCH ? pairs - p : STRETCH;
                    for (int64_t start = 0; start < padded; start += ROWS) {
                        const int n = start + ROWS < padded ? ROWS : (int)(padded - start);
                        with_rows(n, [&](auto number) {
                            constexpr int N = decltype(number)::value;
                            multiply<N>(panel + p * PANEL * 2, panel_bytes, x + start * pairs + p * N, count,
                                        sums + start * GROUP + column);
                        });
                    }
                }
            }
            write_y(c, group * GROUP, sums, steps);
        }
    }
    std::free(memory);
    return true;
}
}  // namespace

extern "C" {

// 0, or -1 where memory is short
int tersor_int8_matmul(const Call* call) {
    for (int64_t first = 0; first < call->rows; first += MAX_CHUNK) {
        Call c = *call;
        const int64_t size = c.type == F32 ? 4 : 2;
        c.x = (const char*)c.x + first * c.x_stride * size;
        c.y = (char*)c.y + first * c.outputs * size;
        c.rows = c.rows - first < MAX_CHUNK ? c.rows - first : MAX_CHUNK;
        if (!run(c)) return -1;
    }
    return 0;
}
}
