// What a Mamba mixer does between its matmuls, on a CPU: the causal convolution and the selective scan, each in one pass over
// time, with all that is elementwise beside them.
//
//     y = SiLU(bias + sum_k weight_k x_{t - width + 1 + k})                             the convolution
//     h = exp(dt A) h + dt x B,   y = (h . C + D x) SiLU(z)                            the scan: h of n numbers a channel
//
// Sixteen channels go side by side, as the compiler vectorizes loops over them, so that the sum over n needs no exchange
// between lanes. Their states stay in registers or the first cache from the first token to the last.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matmul_call.h"

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

// log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|.
inline float softplus(float x) {
    const float u = exponential(x < 0.0f ? x : -x);
    const float s = u / (2.0f + u), q = s * s;
    float p = 1.0f / 15.0f;
    p = p * q + 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    p = p * q + 1.0f;
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// One token of the convolution: what a channel's sum needs lies side by side.
void conv_one(const float* x, int64_t stride, const float* weight, const float* bias, const float* before, float* after,
              float* y, int64_t batch, int64_t channels, int64_t width, int activate, int threads) {
    const int64_t past = width - 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b) {
        const float* in = x + b * stride;
        float *out = y + b * channels, *next = after + b * channels * past;
        for (int64_t c = 0; c < channels; ++c, next += past) {
            const float* own = before == nullptr ? nullptr : before + (b * channels + c) * past;
            const float* w = weight + c * width;
            float sum = bias == nullptr ? 0.0f : bias[c];
            for (int64_t k = 0; k < past && own != nullptr; ++k) sum += w[k] * own[k];
            for (int64_t k = 0; k + 1 < past; ++k) next[k] = own == nullptr ? 0.0f : own[k + 1];
            if (past > 0) next[past - 1] = in[c];
            out[c] = sum + w[past] * in[c];
        }
        if (activate) {
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) out[c] = silu(out[c]);
        }
    }
}

// One token of the scan: the numbers of a channel's state lie side by side, and the loop over them is the vector. N: their count
// where the compiler may know it, else 0.
template <int N>
void scan_one(const float* x, const float* dt, const float* A, const float* B, const float* C, float* y, float* state,
              int64_t batch, int64_t channels, int64_t count, const float* D, const float* z, int64_t z_stride,
              int positive, int threads) {
    const int64_t n = N ? N : count;
    const int64_t blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t index = 0; index < batch * blocks; ++index) {
        const int64_t b = index / blocks, first = index % blocks * LANES;
        const int64_t lanes = channels - first < LANES ? channels - first : LANES;
        alignas(64) float step[LANES] = {}, gate[LANES] = {}, out[LANES];
        const float *Bt = B + b * n, *Ct = C + b * n, *in = x + b * channels + first;
        for (int64_t lane = 0; lane < lanes; ++lane) step[lane] = dt[b * channels + first + lane];
        if (positive) {
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane) step[lane] = softplus(step[lane]);
        }
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const float* a = A + (first + lane) * n;
            float* h = state + (b * channels + first + lane) * n;
            const float by = step[lane], moved = by * in[lane];
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
                h[i] = exponential(by * a[i]) * h[i] + moved * Bt[i];
                sum += h[i] * Ct[i];
            }
            out[lane] = sum + (D == nullptr ? 0.0f : D[first + lane] * in[lane]);
        }
        if (z != nullptr) {
            for (int64_t lane = 0; lane < lanes; ++lane) gate[lane] = z[b * z_stride + first + lane];
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane) out[lane] *= silu(gate[lane]);
        }
        for (int64_t lane = 0; lane < lanes; ++lane) y[b * channels + first + lane] = out[lane];
    }
}

struct Layer {
    Linear in_proj, x_proj, dt_proj, out_proj;
    const float *norm, *conv_weight, *conv_bias, *A, *D;
    const float *conv_before, *state_before;
    float *conv_after, *state_after;
};

// y = W x + bias for one row; `halves` has room for x and y in bfloat16, which the matmul takes where type is 1.
int apply(const Linear& linear, Matmul matmul, const float* x, float* y, uint16_t* halves) {
    Call call = linear.call;
    const bool half = call.type == 1;
    uint16_t* short_y = halves + linear.inputs;
    if (half) {
        for (int64_t i = 0; i < linear.inputs; ++i) halves[i] = to_bf16(x[i]);
    }
    call.x = half ? (const void*)halves : x;
    call.x_stride = linear.inputs;
    call.y = half ? (void*)short_y : y;
    call.rows = 1;
    if (int failed = matmul(&call)) return failed;
    if (half) {
        for (int64_t i = 0; i < call.outputs; ++i) y[i] = from_bf16(short_y[i]);
    }
    if (linear.bias != nullptr) {
        for (int64_t i = 0; i < call.outputs; ++i) y[i] += linear.bias[i];
    }
    return 0;
}

}  // namespace

extern "C" {

// x [batch, tokens, channels], rows of `stride` floats; y the same, contiguous; weight [channels, width], bias [channels] or null;
// before, after [batch, channels, width - 1]: the last inputs of each channel; before may be null for zeros. width is at most 16.
void tersor_causal_conv(const float* x, int64_t stride, const float* weight, const float* bias, const float* before,
                        float* after, float* y, int64_t batch, int64_t tokens, int64_t channels, int64_t width,
                        int activate, int threads) {
    if (tokens == 1) {
        conv_one(x, stride, weight, bias, before, after, y, batch, channels, width, activate, threads);
        return;
    }
    const int64_t past = width - 1;
    std::vector<float> by_place(width * channels), seen(batch * past * channels);  // [width, channels], [batch, past, channels]
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < width; ++k) by_place[k * channels + c] = weight[c * width + k];
        for (int64_t b = 0; b < batch && before != nullptr; ++b) {
            for (int64_t k = 0; k < past; ++k) seen[(b * past + k) * channels + c] = before[(b * channels + c) * past + k];
        }
    }
    const auto row_of = [&](int64_t b, int64_t t) {
        return t < 0 ? seen.data() + (b * past + past + t) * channels : x + (b * tokens + t) * stride;
    };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t index = 0; index < batch * tokens; ++index) {
        const int64_t b = index / tokens, t = index % tokens;
        float* out = y + index * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] = bias == nullptr ? 0.0f : bias[c];
        for (int64_t k = 0; k < width; ++k) {
            const float *row = row_of(b, t - past + k), *w = by_place.data() + k * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) out[c] += w[c] * row[c];
        }
        if (activate) {
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) out[c] = silu(out[c]);
        }
    }
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t k = 0; k < past; ++k) {
            const float* row = row_of(b, tokens - past + k);
            for (int64_t c = 0; c < channels; ++c) after[(b * channels + c) * past + k] = row[c];
        }
    }
}

// x, dt, y [batch, tokens, channels], A [channels, n], B, C [batch, tokens, n], state [batch, channels, n], all contiguous.
// state: at first the one before, at last the one after. before [chunks, batch, channels, n], or null: the state before every
// `chunk` tokens. n is at most 256. D [channels] or null. z [batch, tokens, channels], rows of z_stride floats, or null.
// positive: dt is used as softplus(dt).
void tersor_selective_scan(const float* x, const float* dt, const float* A, const float* B, const float* C, float* y,
                           float* state, float* before, int64_t batch, int64_t tokens, int64_t channels, int64_t n,
                           int64_t chunk, const float* D, const float* z, int64_t z_stride, int positive, int threads) {
    if (tokens == 1 && before == nullptr) {
        const auto scan = n == 16 ? scan_one<16> : scan_one<0>;
        scan(x, dt, A, B, C, y, state, batch, channels, n, D, z, z_stride, positive, threads);
        return;
    }
    const int64_t blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t index = 0; index < batch * blocks; ++index) {
        const int64_t b = index / blocks, first = index % blocks * LANES;
        const int64_t width = channels - first < LANES ? channels - first : LANES;
        alignas(64) float h[256][LANES], a[256][LANES];
        std::memset(h, 0, n * sizeof h[0]);  // of what is used: clearing all takes longer than one token
        std::memset(a, 0, n * sizeof a[0]);
        alignas(64) float step[LANES] = {}, in[LANES] = {}, gate[LANES] = {}, skip[LANES] = {}, now[LANES] = {}, out[LANES];
        float* own = state + (b * channels + first) * n;
        for (int64_t lane = 0; lane < width; ++lane) {
            for (int64_t i = 0; i < n; ++i) {
                h[i][lane] = own[lane * n + i];
                a[i][lane] = A[(first + lane) * n + i];
            }
            if (D != nullptr) skip[lane] = D[first + lane];
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
                now[lane] = x[place + lane];
            }
            if (positive) {
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) step[lane] = softplus(step[lane]);
            }
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane) {
                in[lane] = step[lane] * now[lane];
                out[lane] = skip[lane] * now[lane];
            }
            const float* Bt = B + (b * tokens + t) * n;
            const float* Ct = C + (b * tokens + t) * n;
            for (int64_t i = 0; i < n; ++i) {
                const float b_i = Bt[i], c_i = Ct[i];
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) {
                    const float next = exponential(step[lane] * a[i][lane]) * h[i][lane] + in[lane] * b_i;
                    h[i][lane] = next;
                    out[lane] += next * c_i;
                }
            }
            if (z != nullptr) {
                const float* row = z + (b * tokens + t) * z_stride + first;
                for (int64_t lane = 0; lane < width; ++lane) gate[lane] = row[lane];
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) out[lane] *= silu(gate[lane]);
            }
            for (int64_t lane = 0; lane < width; ++lane) y[place + lane] = out[lane];
        }
        for (int64_t lane = 0; lane < width; ++lane) {
            for (int64_t i = 0; i < n; ++i) own[lane * n + i] = h[i][lane];
        }
    }
}

// One token of one sequence through `count` Mamba-1 layers: x [d_model] += mixer(norm(x)) in each. room: floats, at least
// 2 d_model + 5 d_inner + rank + 2 n, twice (activations in bfloat16 lie behind the others). Returns 0, or what the matmul says.
int tersor_mamba_token(const Layer* layers, int64_t count, Matmul matmul, float* x, float* room, int64_t d_model,
                       int64_t d_inner, int64_t n, int64_t rank, int64_t width, float eps, int threads) {
    float *normed = room, *mixed = normed + d_model, *xz = mixed + d_model, *in = xz + 2 * d_inner;
    float *dt = in + d_inner, *y = dt + d_inner, *dt_B_C = y + d_inner;
    uint16_t* halves = (uint16_t*)(dt_B_C + rank + 2 * n);
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d_model; ++i) sum += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(sum / d_model + eps);
        for (int64_t i = 0; i < d_model; ++i) normed[i] = x[i] * scale * layer->norm[i];
        if (int failed = apply(layer->in_proj, matmul, normed, xz, halves)) return failed;
        conv_one(xz, 0, layer->conv_weight, layer->conv_bias, layer->conv_before, layer->conv_after, in, 1, d_inner, width, 1,
                 1);
        if (int failed = apply(layer->x_proj, matmul, in, dt_B_C, halves)) return failed;
        if (int failed = apply(layer->dt_proj, matmul, dt_B_C, dt, halves)) return failed;
        std::memcpy(layer->state_after, layer->state_before, d_inner * n * sizeof(float));
        const auto scan = n == 16 ? scan_one<16> : scan_one<0>;
        scan(in, dt, layer->A, dt_B_C + rank, dt_B_C + rank + n, y, layer->state_after, 1, d_inner, n, layer->D,
             xz + d_inner, 0, 1, threads);
        if (int failed = apply(layer->out_proj, matmul, y, mixed, halves)) return failed;
        for (int64_t i = 0; i < d_model; ++i) x[i] += mixed[i];
    }
    return 0;
}
}
