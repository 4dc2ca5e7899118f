// AMX's tile instructions in plain C++, put before the kernel with -include: the kernel's AMX path then runs, slowly, on
// any processor with AVX-512 BF16. Sums are taken in float32 without the hardware's order; subnormals are kept.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_loadconfig
#define _tile_release amx_release
#define _tile_zero amx_zero
#define _tile_loadd amx_loadd
#define _tile_stored amx_stored
#define _tile_dpbf16ps amx_dpbf16ps

struct AmxState {
    bool configured;
    uint32_t tile[8][16][16];
};
static thread_local AmxState amx;

// Anything but eight full tiles, and any use before the configuration, leaves sums that the tests reject.
static inline void amx_loadconfig(const void* p) {
    const uint8_t* rows = (const uint8_t*)p + 48;
    const uint16_t* bytes = (const uint16_t*)((const char*)p + 16);
    amx.configured = *(const uint8_t*)p == 1;
    for (int t = 0; t < 8; t++) amx.configured = amx.configured && rows[t] == 16 && bytes[t] == 64;
}
static inline void amx_release() { amx.configured = false; }
static inline void amx_zero(int t) { std::memset(amx.tile[t], 0, sizeof amx.tile[t]); }
static inline void amx_loadd(int t, const void* p, int64_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(amx.tile[t][r], (const char*)p + r * stride, 64);
}
static inline void amx_stored(int t, void* p, int64_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy((char*)p + r * stride, amx.tile[t][r], 64);
}
static inline float amx_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline void amx_dpbf16ps(int c, int a, int b) {
    if (!amx.configured) return;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum = amx_float(amx.tile[c][m][n]);
            for (int k = 0; k < 16; k++) {
                uint32_t x = amx.tile[a][m][k], w = amx.tile[b][k][n];
                sum += amx_float(x << 16) * amx_float(w << 16) + amx_float(x & 0xffff0000u) * amx_float(w & 0xffff0000u);
            }
            std::memcpy(&amx.tile[c][m][n], &sum, 4);
        }
}
