// How the work of a packed matmul is dealt out to thread blocks. It is a list of items, item = output tile * k_stages +
// stage of the inputs, cut into equal runs, one a block. A tile that several blocks share is summed by the last of them to
// arrive, always in the same order, so that results are reproducible.
//
// Put behind hopper.cuh, with these constants:
//   N_TILE: rows of x in an output tile | TILE_BLOCKS: of 64 outputs in it
//   TEAMS, TEAM_THREADS: an output tile's sums lie with so many teams of so many threads, by threadIdx.x
//   ACCUMULATORS: sums a thread, a multiple of 4

struct Shape {
    u32 rows, outputs, inputs;              // of x and y
    u32 row_tiles, weight_blocks, k_tiles;  // x in N_TILE rows, the weight in 64 outputs, the inputs in K_TILE
    u32 k_stages;                           // the inputs in stages
    u32 run_tiles;                          // output tiles a block, rounded up

    __device__ __forceinline__ u32 output_tiles() const { return (weight_blocks + TILE_BLOCKS - 1) / TILE_BLOCKS; }
};

// The run of work items of block `b`.
__device__ __forceinline__ u32 first_item(u32 b, u32 items) { return u32(u64(b) * items / gridDim.x); }
__device__ __forceinline__ u32 block_of(u32 item, u32 items) { return u32(((u64(item) + 1) * gridDim.x - 1) / items); }

struct Place {
    u32 row_tile, output_tile;
};

// Where a tile lies: so that what the blocks do at the same time, each being at the same turn of its run, is a
// rectangle of few row tiles by few output tiles, whose x and weight the L2 cache holds.
__device__ __forceinline__ Place place_of(u32 tile, const Shape& s) {
    if (s.row_tiles == 1) return {0, tile};
    constexpr u32 BAND = 8;  // row tiles
    const u32 output_tiles = s.output_tiles(), tiles = output_tiles * s.row_tiles;
    const u32 runs = (tiles + s.run_tiles - 1) / s.run_tiles, last_run = tiles - (runs - 1) * s.run_tiles;
    const u32 run = tile / s.run_tiles, turn = tile % s.run_tiles;
    u32 rank = turn * runs + run - (turn > last_run ? turn - last_run : 0);  // the last run has fewer turns
    const u32 band = rank / (BAND * output_tiles), band_rows = min(BAND, s.row_tiles - band * BAND);
    rank -= band * BAND * output_tiles;
    return {band * BAND + rank % band_rows, rank / band_rows};
}

// Sums of outputs n, n + 1 (n even) and columns 8j + 2t, 8j + 2t + 1 of x, t = lane % 4, are a thread's sums 4j .. 4j + 3
// (the first output's two columns, then the second's).
template <int COUNT>
__device__ __forceinline__ void store(const float (&sums)[COUNT], u16* y, const Shape& s, u32 row_tile, u32 n) {
    const u32 first_m = row_tile * N_TILE + threadIdx.x % 4 * 2;
    u16* target = y + u64(first_m) * s.outputs + n;
    const bool pairs = s.outputs % 2 == 0 && n < s.outputs, all_rows = (row_tile + 1) * N_TILE <= s.rows;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4, target += 8 * u64(s.outputs))
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            const bool inside = all_rows || first_m + 2 * i + column < s.rows;
            u16* at = target + column * s.outputs;
            const u32 pair = pack(sums[i + column], sums[i + 2 + column]);
            if (pairs && inside) *reinterpret_cast<u32*>(at) = pair;
            if (!pairs && inside && n < s.outputs) at[0] = pair & 0xffff;
            if (!pairs && inside && n + 1 < s.outputs) at[1] = pair >> 16;
        }
}

// Orders the shared and global memory of a team's threads.
__device__ __forceinline__ void wait_for_team(int team) {
    if (TEAM_THREADS == 32)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(TEAM_THREADS) : "memory");
}

// Adds up what the blocks that share this tile computed. True for the last to arrive, who has the whole sum then.
__device__ __forceinline__ bool reduce(float (&sums)[ACCUMULATORS], float* partials, u32* counters, u32 tile, u32 items,
                                       u32 k_stages, bool first_run, int team, int thread) {
    __shared__ u32 arrived[TEAMS];
    // A block's run holds at most two shared tiles: its first, which another may have begun, and its last.
    auto slot = [&](u32 block, bool first) {
        return reinterpret_cast<float4*>(partials) +
               ((u64(block) * 2 + (first ? 0 : 1)) * TEAMS + team) * (ACCUMULATORS / 4) * TEAM_THREADS + thread;
    };
    float4* own = slot(blockIdx.x, first_run);
#pragma unroll
    for (int i = 0; i < ACCUMULATORS / 4; ++i)
        __stcg(own + i * TEAM_THREADS, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    const u32 start = tile * k_stages, first = block_of(start, items), last = block_of(start + k_stages - 1, items);
    u32* counter = counters + first * TEAMS + team;  // a block begins at most one tile that it does not finish
    wait_for_team(team);
    if (thread == 0) {  // releases what the whole team wrote, acquires what the others did
        u32 before;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        if (before == last - first) *counter = 0;  // for the next launch
        arrived[team] = before;
    }
    wait_for_team(team);
    if (arrived[team] != last - first) return false;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = 0;
#pragma unroll(ACCUMULATORS <= 16 ? 16 / (ACCUMULATORS / 4) : 1)
    for (u32 block = first; block <= last; ++block) {
        const float4* part = slot(block, first_item(block, items) >= start);
#pragma unroll
        for (int i = 0; i < ACCUMULATORS / 4; ++i) {
            const float4 value = __ldcg(part + i * TEAM_THREADS);
            sums[4 * i] += value.x, sums[4 * i + 1] += value.y, sums[4 * i + 2] += value.z, sums[4 * i + 3] += value.w;
        }
    }
    return true;
}
