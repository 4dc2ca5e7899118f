// Mamba-1's selective scan on a CPU: what `chunked` of selective_scan.py computes, in one pass over time.
//
//     h = exp(dt A) h + dt x B,   y = h . C        for every channel, h of n numbers
//
// Sixteen channels go side by side, as the compiler vectorizes loops over them, so that the sum over n needs no exchange
// between lanes. Their states stay in registers or the first cache from the first token to the last.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

float from_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

int32_t to_bits(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// e^x = 2^k e^r with |r| <= ln(2) / 2 and the series of e^r; 2 units in the last place. Below -87 it stays at e^-87.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const float moved = x * 1.44269504f + shift;
    const float k = moved - shift;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln(2) in two parts
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits((to_bits(moved) - to_bits(shift) + 127) << 23);
}

}  // namespace

extern "C" {

// x, dt, y [batch, tokens, channels], A [channels, n], B, C [batch, tokens, n], state [batch, channels, n], all contiguous.
// state: at first the one before, at last the one after. before [chunks, batch, channels, n], or null: the state before every
// `chunk` tokens. n is at most 256.
void tersor_selective_scan(const float* x, const float* dt, const float* A, const float* B, const float* C, float* y,
                           float* state, float* before, int64_t batch, int64_t tokens, int64_t channels, int64_t n,
                           int64_t chunk, int threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t index = 0; index < batch * blocks; ++index) {
        const int64_t b = index / blocks, first = index % blocks * LANES;
        const int64_t width = channels - first < LANES ? channels - first : LANES;
        alignas(64) float h[256][LANES] = {}, a[256][LANES] = {};
        alignas(64) float step[LANES] = {}, in[LANES] = {}, out[LANES];
        float* own = state + (b * channels + first) * n;
        for (int64_t lane = 0; lane < width; ++lane) {
            for (int64_t i = 0; i < n; ++i) {
                h[i][lane] = own[lane * n + i];
                a[i][lane] = A[(first + lane) * n + i];
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            if (before != nullptr && t % chunk == 0) {
                float* kept = before + ((t / chunk * batch + b) * channels + first) * n;
                for (int64_t lane = 0; lane < width; ++lane) {
                    for (int64_t i = 0; i < n; ++i) kept[lane * n + i] = h[i][lane];
                }
            }
            const int64_t place = (b * tokens + t) * channels + first;
            for (int64_t lane = 0; lane < width; ++lane) {
                step[lane] = dt[place + lane];
                in[lane] = dt[place + lane] * x[place + lane];
            }
            const float* Bt = B + (b * tokens + t) * n;
            const float* Ct = C + (b * tokens + t) * n;
            for (int lane = 0; lane < LANES; ++lane) out[lane] = 0.0f;
            for (int64_t i = 0; i < n; ++i) {
                const float b_i = Bt[i], c_i = Ct[i];
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) {
                    const float next = exponential(step[lane] * a[i][lane]) * h[i][lane] + in[lane] * b_i;
                    h[i][lane] = next;
                    out[lane] += next * c_i;
                }
            }
            for (int64_t lane = 0; lane < width; ++lane) y[place + lane] = out[lane];
        }
        for (int64_t lane = 0; lane < width; ++lane) {
            for (int64_t i = 0; i < n; ++i) own[lane * n + i] = h[i][lane];
        }
    }
}
}
