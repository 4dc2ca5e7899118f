// The decoder of the LLaMA family on a CPU, but for its prefill attention: norms, rotary positions, one-token attention over
// a static cache, the gated MLP and the residuals, around the matmul of kernels/quantized_matmul_cpu.cpp, which is called
// through a pointer. Compiled at first use by llama_cpu.py, which also fills the structs and says which models fit.
//
// All is float32 and row major: hidden [rows, hidden], queries [rows, heads * head_dim], a layer's keys and values
// [batch, kv_heads, capacity, head_dim]. Rows are batch * tokens; row r belongs to sequence r / tokens and to position
// start + r % tokens.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels/matmul_call.h"

namespace {

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *input_norm, *mlp_norm, *q_norm, *k_norm;  // the last two: [head_dim], or null
    float *keys, *values;
    int64_t window;  // positions that a query sees, its own included; 0: all
};

struct Model {
    Matmul matmul;
    int64_t hidden_size, heads, kv_heads, head_dim, mlp_size, capacity, layers;
    const Layer* layer;
    Linear head;
    const float *final_norm, *cos, *sin;  // cos, sin: [capacity, head_dim]
    float eps;
    int bf16, threads;                    // bf16: the matmuls take and give bf16
    float *hidden, *normed, *queries, *keys, *values, *attended, *gate, *up, *scores;
    uint16_t *half_x, *half_y;
    // scores [threads, heads / kv_heads, capacity]; the others are of as many rows as one call may have
};

// e^x within 2 units of the last place: 2^round(x / ln 2) times a polynomial of the rest. In this form compilers vectorize it.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float whole = shifted - 12582912.0f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits, power;
    std::memcpy(&bits, &shifted, 4);
    power = (bits - 0x4b400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

int threads_for(const Model& m, int64_t work) { return work < (1 << 15) ? 1 : m.threads; }

// y [rows, outputs] = x [rows, inputs] W^T + bias
bool multiply(const Model& m, const Linear& w, const float* x, int64_t rows, float* y) {
    Call call = w.call;
    const int64_t outputs = call.outputs;
    call.rows = rows, call.x_stride = w.inputs, call.x = x, call.y = y;
    call.threads = rows * w.inputs * outputs < (1 << 18) ? 1 : m.threads;
    if (m.bf16) {
#pragma omp parallel for simd num_threads(threads_for(m, rows * w.inputs))
        for (int64_t i = 0; i < rows * w.inputs; i++) m.half_x[i] = to_bf16(x[i]);
        call.x = m.half_x, call.y = m.half_y;
    }
    if (m.matmul(&call) != 0) return false;
    if (m.bf16) {
#pragma omp parallel for simd num_threads(threads_for(m, rows * outputs))
        for (int64_t i = 0; i < rows * outputs; i++) y[i] = from_bf16(m.half_y[i]);
    }
    if (w.bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < outputs; i++) y[r * outputs + i] += w.bias[i];
    return true;
}

// y = x / rms(x) * weight
void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
    const float scale = 1 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = weight[i] * (x[i] * scale);
}

void norm_rows(const Model& m, const float* weight, int64_t rows) {
#pragma omp parallel for num_threads(threads_for(m, rows * m.hidden_size))
    for (int64_t r = 0; r < rows; r++)
        rms_norm(m.hidden + r * m.hidden_size, weight, m.eps, m.hidden_size, m.normed + r * m.hidden_size);
}

// Norm (where there is one) and rotation of one head, to where it goes.
void rotate(const Model& m, float* x, const float* norm, int64_t position, float* y) {
    const int64_t half = m.head_dim / 2;
    const float *cos = m.cos + position * m.head_dim, *sin = m.sin + position * m.head_dim;
    if (norm) rms_norm(x, norm, m.eps, m.head_dim, x);
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cos[i] - b * sin[i];
        y[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

bool before_attention(const Model& m, const Layer& l, int64_t batch, int64_t tokens, int64_t start) {
    const int64_t rows = batch * tokens, d = m.head_dim;
    norm_rows(m, l.input_norm, rows);
    if (!multiply(m, l.q, m.normed, rows, m.queries) || !multiply(m, l.k, m.normed, rows, m.keys) ||
        !multiply(m, l.v, m.normed, rows, m.values))
        return false;
#pragma omp parallel for num_threads(threads_for(m, rows * m.heads * d))
    for (int64_t r = 0; r < rows; r++) {
        const int64_t position = start + r % tokens;
        for (int64_t h = 0; h < m.heads; h++) {
            float* query = m.queries + (r * m.heads + h) * d;
            rotate(m, query, l.q_norm, position, query);
        }
        for (int64_t h = 0; h < m.kv_heads; h++) {
            const int64_t place = ((r / tokens * m.kv_heads + h) * m.capacity + position) * d;
            rotate(m, m.keys + (r * m.kv_heads + h) * d, l.k_norm, position, l.keys + place);
            std::memcpy(l.values + place, m.values + (r * m.kv_heads + h) * d, 4 * d);
        }
    }
    return true;
}

// One query of each of the heads that share a key-value head, over positions first .. last. scores: [group, capacity]
void attend(const Model& m, const float* queries, const float* keys, const float* values, int64_t first, int64_t last,
            float* scores, float* out) {
    const int64_t d = m.head_dim, group = m.heads / m.kv_heads, count = last - first + 1;
    const float scale = 1 / std::sqrt((float)d);
    for (int64_t t = 0; t < count; t++) {
        const float* key = keys + (first + t) * d;
        for (int64_t g = 0; g < group; g++) {
            const float* query = queries + g * d;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += query[i] * key[i];
            scores[g * m.capacity + t] = sum * scale;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *s = scores + g * m.capacity, largest = s[0], sum = 0;
        for (int64_t t = 1; t < count; t++) largest = s[t] > largest ? s[t] : largest;
        for (int64_t t = 0; t < count; t++) s[t] = exponential(s[t] - largest);
        for (int64_t t = 0; t < count; t++) sum += s[t];
        for (int64_t t = 0; t < count; t++) s[t] /= sum;
    }
    std::memset(out, 0, 4 * group * d);
    for (int64_t t = 0; t < count; t++)
        for (int64_t g = 0; g < group; g++) {
            const float weight = scores[g * m.capacity + t], *value = values + (first + t) * d;
            for (int64_t i = 0; i < d; i++) out[g * d + i] += weight * value[i];
        }
}

void attention(const Model& m, const Layer& l, int64_t batch, int64_t position) {
    const int64_t d = m.head_dim, group = m.heads / m.kv_heads, tasks = batch * m.kv_heads;
    const int64_t first = l.window && position >= l.window ? position - l.window + 1 : 0;
    const int threads = threads_for(m, batch * m.heads * d * (position - first + 1));
    // Each thread takes an equal run of heads, and the scores' buffer of that run.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = tasks * part / threads; i < tasks * (part + 1) / threads; i++)
            attend(m, m.queries + i * group * d, l.keys + i * m.capacity * d, l.values + i * m.capacity * d, first,
                   position, m.scores + part * group * m.capacity, m.attended + i * group * d);
}

void add_to_hidden(const Model& m, const float* x, int64_t rows) {
    const int64_t size = rows * m.hidden_size;
#pragma omp parallel for simd num_threads(threads_for(m, size))
    for (int64_t i = 0; i < size; i++) m.hidden[i] += x[i];
}

bool after_attention(const Model& m, const Layer& l, int64_t rows) {
    if (!multiply(m, l.o, m.attended, rows, m.normed)) return false;
    add_to_hidden(m, m.normed, rows);
    norm_rows(m, l.mlp_norm, rows);
    if (!multiply(m, l.gate, m.normed, rows, m.gate) || !multiply(m, l.up, m.normed, rows, m.up)) return false;
    const int64_t size = rows * m.mlp_size;
#pragma omp parallel for simd num_threads(threads_for(m, size))
    for (int64_t i = 0; i < size; i++) m.gate[i] = m.gate[i] / (1 + exponential(-m.gate[i])) * m.up[i];
    if (!multiply(m, l.down, m.gate, rows, m.normed)) return false;
    add_to_hidden(m, m.normed, rows);
    return true;
}
}  // namespace

extern "C" {

// Each returns 0, or -1 where memory is short.

int tersor_before_attention(const Model* m, int64_t layer, int64_t batch, int64_t tokens, int64_t start) {
    return before_attention(*m, m->layer[layer], batch, tokens, start) ? 0 : -1;
}

int tersor_after_attention(const Model* m, int64_t layer, int64_t rows) {
    return after_attention(*m, m->layer[layer], rows) ? 0 : -1;
}

// From m->hidden to logits [rows, vocabulary].
int tersor_logits(const Model* m, int64_t rows, float* logits) {
    norm_rows(*m, m->final_norm, rows);
    return multiply(*m, m->head, m->normed, rows, logits) ? 0 : -1;
}

// One token of every sequence through all layers, to logits [batch, vocabulary].
int tersor_decode(const Model* m, int64_t batch, int64_t position, float* logits) {
    for (int64_t i = 0; i < m->layers; i++) {
        const Layer& l = m->layer[i];
        if (!before_attention(*m, l, batch, 1, position)) return -1;
        attention(*m, l, batch, position);
        if (!after_attention(*m, l, batch)) return -1;
    }
    return tersor_logits(m, batch, logits);
}
}
