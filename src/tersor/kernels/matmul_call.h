// What quantized_matmul_cpu.cpp takes, for those that call it through a pointer (runtime/llama_cpu.cpp, mamba_cpu.cpp), and the
// conversions that its 16-bit activations need. The fields are those of `Call` in quantized_matmul_cpu.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Call {
    const void* x;            // [rows, inputs] of `type`
    int64_t x_stride;         // elements between rows
    void* y;                  // [rows, outputs] of `type`, contiguous
    int64_t rows, outputs;
    const uint32_t* packed;   // [panels, blocks, words, PANEL]
    const int32_t* columns;   // [blocks * inputs of a block] column of x at every packed place, -1 = none; null = in order
    const int32_t* starts;    // [groups + 1] first block of every group
    int64_t groups;
    const void* scales;       // [panels, groups, PANEL] of `scale_type`
    const uint8_t* zeros;     // [panels, groups, PANEL], null where all are 2^(bits-1)
    int type, scale_type, bits, threads;
    int round_x;              // float32 x may be taken in fixed point where that is faster
};

using Matmul = int (*)(const Call*);

struct Linear {
    Call call;  // but for x, y and rows
    int64_t inputs;
    const float* bias;  // or null
};

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace
