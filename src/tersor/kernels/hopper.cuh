// What the kernels for Hopper (sm_90a) share: pairs of 16-bit floats, barriers in shared memory, mma.sync.
//
// Put before a kernel's source, with this constant: BFLOAT: the 16-bit floats are bfloat16, not float16.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// ---------------------------------------------------------------------------------------------- numbers

__device__ __forceinline__ constexpr u32 twice(int value) {  // an integer |value| < 2048 as a pair of 16-bit floats
    u32 sign = value < 0 ? 0x8000u : 0u, magnitude = value < 0 ? -value : value, exponent = 0;
    if (magnitude == 0) return 0;
    while ((magnitude >> exponent) > 1) ++exponent;
    u32 half = BFLOAT ? ((exponent + 127) << 7) | (((magnitude << 7) >> exponent) & 0x7f)
                      : ((exponent + 15) << 10) | (((magnitude << 10) >> exponent) & 0x3ff);
    return (sign | half) * 0x10001u;
}
__device__ __forceinline__ constexpr u32 twice_power(int exponent) {  // 2^exponent as a pair
    return (BFLOAT ? u32(exponent + 127) << 7 : u32(exponent + 15) << 10) * 0x10001u;
}

#if BFLOAT
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
__device__ __forceinline__ u32 keep(u32 value) {  // in a register, not computed again
    asm volatile("" : "+r"(value));
    return value;
}
__device__ __forceinline__ u32 add(u32 a, u32 b) {
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(twice(1)), "r"(b));
    return d;
}
__device__ __forceinline__ u32 fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 mul(u32 a, u32 b) {
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 d;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// ---------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed != 0;
}

// ---------------------------------------------------------------------------------------------- tensor cores

// d[16, 8] = a[16, 16] · x[16, 8] (+ d), a warp's.
__device__ __forceinline__ void mma(float* d, const u32 (&a)[4], u32 x0, u32 x1, bool add) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = add ? d[i] : 0;
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x0), "r"(x1));
}
// Four matrices of 8 rows of 8 16-bit floats; lanes 8i .. 8i + 7 have the addresses of matrix i's rows. A lane gets
// numbers 2 (lane % 4) and the next of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&fragment)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
}
