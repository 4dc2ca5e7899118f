// Tiles of a packed weight as a dense matrix [outputs, k_tiles * 128] of 16-bit floats, scale * (code - zero).
//
// A thread block turns one tile of 64 outputs x 128 inputs. Compiled at run time by quantized_matmul_mma.py, which prepends
// hopper.cuh and packed_tile.cuh with their constants.

constexpr int PITCH = K_TILE * 2 + 16;  // bytes of a row in shared memory: 8 rows lie in different banks

extern "C" __global__ void __launch_bounds__(128) dequantize_tiles(const u8* tiles, u8* dense, u32 k_tiles) {
    __shared__ __align__(128) u8 packed[TILE_BYTES];
    __shared__ __align__(128) u8 numbers[64 * PITCH];
    const u32 block = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles, thread = threadIdx.x;
    const uint4* source = reinterpret_cast<const uint4*>(tiles + u64(blockIdx.x) * TILE_BYTES);
    for (int i = thread; i < TILE_BYTES / 16; i += 128) reinterpret_cast<uint4*>(packed)[i] = source[i];
    __syncthreads();

    const u32 base = u32(__cvta_generic_to_shared(packed)), row = thread / 32 * 16 + thread % 32 / 4 * 2;
    const u32 scales = base + CODE_BYTES + row * 2, zeros = base + CODE_BYTES + SCALE_BYTES + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 words[WORDS];
        load_words(words, base + thread * 16 + half * (CODE_BYTES / 2), thread);
#pragma unroll
        for (int i = 0; i < 16; ++i) {  // pair i: 16-input step i / 4, its upper 8 inputs i / 2 % 2, row i % 2
            const Group group = load_group(scales, zeros, (half * 64 + i / 4 * 16) / GROUP);
            const u32 number = half * 64 + i / 4 * 16 + i / 2 % 2 * 8 + thread % 4 * 2;
            *reinterpret_cast<u32*>(numbers + (row + i % 2) * PITCH + number * 2) =
                mul(integer_pair(words, i, group), group.scale_pair[i & 1]);
        }
    }
    __syncthreads();
    for (int i = thread; i < 64 * 16; i += 128)
        *reinterpret_cast<uint4*>(dense + ((u64(block) * 64 + i / 16) * k_tiles + k_tile) * (K_TILE * 2) + i % 16 * 16) =
            *reinterpret_cast<const uint4*>(numbers + i / 16 * PITCH + i % 16 * 16);
}
