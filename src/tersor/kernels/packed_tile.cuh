// A tile of a packed weight as tiled_weight.py lays it out, and how a thread makes integers of its codes (9
// instructions for 8 of them).
//
// Put behind hopper.cuh, with these constants:
//   BITS 2, 3, 4, 8 | GROUP 32, 64, 128 | ZERO: the one zero point, or -1 where each group has its own
//   SCALE_BFLOAT: the scales are bfloat16, not float16 | SCALE_SUMS: scales are wanted as float32, for sums
//
// The weight comes repacked (tiled_weight.py) in tiles of 64 outputs x 128 inputs:
//   codes   [2 halves of 64 inputs][planes][128 threads][16, 8 or 4 bytes]: a thread's 32 codes as 16 pairs, in the
//   order in
//           which the tensor cores want them; a word holds its pairs' first codes in its low half, the second ones in
//           its high half
//   scales  [128 / GROUP][64], 2 bytes each
//   zeros   [128 / GROUP][64], 1 byte each, only where ZERO is -1

constexpr int K_TILE = 128;
constexpr int WORDS = BITS;  // a thread's 32 codes of half a tile
constexpr int GROUPS = K_TILE / GROUP;
constexpr int CODE_BYTES = 64 * K_TILE * BITS / 8;
constexpr int SCALE_BYTES = 2 * 64 * GROUPS;
constexpr int TILE_BYTES = CODE_BYTES + SCALE_BYTES + (ZERO < 0 ? 64 * GROUPS : 0);

constexpr int BASE = BFLOAT ? 128 : 1024;  // the power of two above whose mantissa the codes are placed
constexpr int MANTISSA = BFLOAT ? 7 : 10;
constexpr u32 MAGIC = BFLOAT ? 0x43004300u : 0x64006400u;          // BASE, twice
constexpr int FIELDS = BITS == 3 ? 5 : 16 / BITS;                  // codes in half a word
constexpr int WINDOW = MANTISSA / BITS > 0 ? MANTISSA / BITS : 1;  // of these can be read without a shift

__device__ __forceinline__ float scale_to_float(u16 bits) {
    float f;
    if (SCALE_BFLOAT) return __int_as_float(u32(bits) << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

// What a thread needs to know of one group for its rows g (0) and g + 8 (1).
struct Group {
    float scale[2];
    u32 scale_pair[2];
    u32 minus_zero[2];  // -(BASE + zero) as a pair, or -zero alone where the codes do not fit the mantissa
};

// `scales` and `zeros` are the shared addresses of a tile's first group for this thread's rows.
__device__ __forceinline__ Group load_group(u32 scale_address, u32 zero_address, int group) {
    Group result;
    u32 scales;
    u16 zeros = 0;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(scales) : "r"(scale_address + group * 128));
    if (ZERO < 0) asm volatile("ld.shared.b16 %0, [%1];" : "=h"(zeros) : "r"(zero_address + group * 64));
    for (int r = 0; r < 2; ++r) {
        u32 bits = (scales >> (16 * r)) & 0xffff;
        if (SCALE_SUMS || bool(SCALE_BFLOAT) != bool(BFLOAT)) result.scale[r] = scale_to_float(bits);
        result.scale_pair[r] =
            bool(SCALE_BFLOAT) == bool(BFLOAT) ? bits * 0x10001u : pack(result.scale[r], result.scale[r]);
        u32 zero = (zeros >> (8 * r)) & 0xff;
        if (BFLOAT && BITS == 8)
            result.minus_zero[r] = __float_as_int(-8388608.0f - float(ZERO < 0 ? int(zero) : ZERO));
        else
            result.minus_zero[r] = ZERO < 0 ? (0x80008000u | MAGIC) + zero * 0x10001u : twice(-BASE - ZERO);
    }
    return result;
}

// A thread's words of half a tile, whose planes hold four, two or one words a thread; `half` and `thread` are combined
// in `address`, the shared address of the half plus 16 bytes a thread.
__device__ __forceinline__ void load_words(u32 (&words)[WORDS], u32 address, int thread) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[4 * i]), "=r"(words[4 * i + 1]), "=r"(words[4 * i + 2]), "=r"(words[4 * i + 3])
                     : "r"(address + i * 2048));
    if (WORDS < 4)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address - thread * 8));
    if (WORDS == 3)
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[2 % WORDS]) : "r"(address - thread * 12 + 1024));
}

// (bits & mask) | magic in one instruction, which the compiler does not find where both are constants.
__device__ __forceinline__ u32 place(u32 bits, u32 mask, u32 magic) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(magic));
    return result;
}

// Pair number `index` of a thread's 16 of half a tile, as code - zero, exactly.
__device__ __forceinline__ u32 integer_pair(const u32 (&words)[WORDS], int index, const Group& group) {
    const int r = index & 1;
    if (BFLOAT && BITS == 8) {  // 8 bits overflow bfloat16's mantissa: through float32, whose bytes 0x4b0000 hold 2^23
        u32 word = words[index / 2];
        float low = __int_as_float(__byte_perm(word, 0x4b000000u, index & 1 ? 0x7541 : 0x7540));
        float high = __int_as_float(__byte_perm(word, 0x4b000000u, index & 1 ? 0x7543 : 0x7542));
        float offset = __int_as_float(group.minus_zero[r]);
        return pack(low + offset, high + offset);
    }
    if (BITS == 3 && index == 15) {  // in the two bits of each of the three words that five pairs leave
        u32 value = place(words[0] >> 15, 0x00010001u, MAGIC);
        value = place(words[1 % WORDS] >> 14, 0x00020002u, value);
        value = place(words[2 % WORDS] >> 13, 0x00040004u, value);
        return add(value, group.minus_zero[r]);
    }
    const int field = index % FIELDS, window = field / WINDOW, position = (field % WINDOW) * BITS;
    constexpr u32 ONES = ((1u << BITS) - 1) * 0x10001u;
    const u32 value =
        place(words[index / FIELDS] >> (window * WINDOW * BITS), ONES << position, MAGIC);  // BASE + code * 2^position
    if (position == 0) return add(value, group.minus_zero[r]);
    // All of these are integers below 2^(MANTISSA + 1), hence exact.
    u32 offset =
        ZERO < 0 ? add(group.minus_zero[r], twice(BASE - (BASE >> position))) : twice(-(BASE >> position) - ZERO);
    return fma(value, twice_power(-position), offset);
}

// ---------------------------------------------------------------------------------------------- zero points left to the sums
//
// With codes as they are, sum (code - zero) x = sum code x - zero sum x: one instruction less for each pair. Pair `index`
// is BASE (bfloat16) or 0 (float16) + code * 2^PLACE, in float16 in units of the least subnormal number, which tensor cores
// take at full speed. The place depends on the row alone, so that it can be left to the row's factors.

constexpr bool HAS_RAW_PAIRS = !(BFLOAT && BITS == 8);
__device__ __forceinline__ constexpr int place_in_pair(int row) { return row == 0 || BITS == 8 ? 0 : BITS > MANTISSA / 2 ? 0 : BITS; }

__device__ __forceinline__ u32 raw_pair(const u32 (&words)[WORDS], int index) {
    const int to = place_in_pair(index & 1);
    constexpr u32 ONES = ((1u << BITS) - 1) * 0x10001u;
    if (BITS == 3 && index == 15) {  // in the two bits of each of the three words that five pairs leave
        u32 value = (words[0] >> (15 - to)) & 0x00010001u << to;
        value = place(words[1 % WORDS] >> (14 - to), 0x00020002u << to, value);
        value = place(words[2 % WORDS] >> (13 - to), 0x00040004u << to, value);
        return BFLOAT ? value | MAGIC : value;
    }
    const int from = index % FIELDS * BITS;
    const u32 word = words[index / FIELDS], shifted = from >= to ? word >> (from - to) : word << (to - from);
    return BFLOAT ? place(shifted, ONES << to, MAGIC) : shifted & ONES << to;
}

// scale * (code - zero) x, summed, is code * (sum of raw pairs with x) - zero * (sum of x), for rows g (0) and g + 8 (1).
struct RawFactors {
    float code[2], zero[2];
};
__device__ __forceinline__ RawFactors load_raw_factors(u32 scale_address, u32 zero_address, int group) {
    RawFactors result;
    u32 scales;
    u16 zeros = 0;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(scales) : "r"(scale_address + group * 128));
    if (ZERO < 0) asm volatile("ld.shared.b16 %0, [%1];" : "=h"(zeros) : "r"(zero_address + group * 64));
    for (int r = 0; r < 2; ++r) {
        const float scale = scale_to_float(scales >> (16 * r) & 0xffff), unit = 1.0f / (1 << place_in_pair(r));
        const float zero =
            ZERO < 0 ? __int_as_float(0x4b000000 | (zeros >> (8 * r) & 0xff)) - 8388608.0f : float(ZERO);
        result.code[r] = scale * (BFLOAT ? unit : unit * 16777216.0f);
        result.zero[r] = scale * (BFLOAT ? zero + BASE * unit : zero);
    }
    return result;
}
