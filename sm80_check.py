"""Round of checks and timings of the mma.sync path (not to be merged).   python3 sm80_check.py check|time"""

import concurrent.futures as futures
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import replace

os.environ["CUDA_CACHE_PATH"], os.environ["CUDA_CACHE_MAXSIZE"] = "/tmp/jit", str(2**32 - 1)
import torch  # noqa: E402

sys.path.insert(0, "tests"), sys.path.insert(0, "benchmarks"), sys.path.insert(0, "src")
from kernels.random_weights import random_weight  # noqa: E402

from tersor.kernels import quantized_matmul_cuda as cuda  # noqa: E402
from tersor.kernels import quantized_matmul_mma as mma  # noqa: E402
from tersor.kernels.quantized_matmul import reference  # noqa: E402
from tersor.kernels.quantized_matmul_mma import Launch, SharedMemory, grid_for, launch_for  # noqa: E402
from tersor.kernels.tiled_weight import TiledWeight, prepare  # noqa: E402

ARCH = "compute_80"
P = 132
H200 = SharedMemory.of((9, 0))
A100, ADA = SharedMemory.of((8, 0)), SharedMemory.of((8, 9))
FOUR = (4, 128, 8, False)
SMALL = [
    Launch(8, 2, 4, 2, 2, 2),
    Launch(8, 2, 4, 2, 2, 2, most_stages=3),
    Launch(8, 2, 4, 2, 2, 2, zero_sums=True),
    Launch(8, 2, 4, 2, 2, 3, zero_sums=True),
    Launch(8, 4, 2, 4, 2, 2, zero_sums=True),
    Launch(8, 4, 2, 4, 4, 2, zero_sums=True),
    Launch(8, 1, 8, 1, 2, 2),
    Launch(8, 2, 4, 2, 4, 1, zero_sums=True),
    Launch(8, 2, 4, 1, 2, 3, zero_sums=True),
    Launch(8, 4, 4, 2, 2, 1, zero_sums=True),
    Launch(8, 4, 4, 4, 4, 1, zero_sums=True),
    Launch(8, 4, 1, 4, 4, 3, zero_sums=True),
]
CUTS = {
    8: SMALL,
    16: [replace(how, n_tile=16) for how in SMALL],
    32: [
        Launch(32, 2, 4, 2, 2, 1),
        Launch(32, 2, 8, 1, 1, 1),
        Launch(32, 2, 8, 1, 2, 1),
        Launch(32, 2, 4, 1, 1, 3),
        Launch(32, 2, 4, 1, 2, 2),
        Launch(32, 2, 4, 1, 1, 3, zero_sums=True),
        Launch(32, 4, 4, 2, 2, 1, scale_sums=False),
        Launch(32, 2, 4, 2, 2, 2, scale_sums=False),
        Launch(32, 4, 2, 4, 2, 1, zero_sums=True),
    ],
    64: [
        Launch(64, 2, 8),
        Launch(64, 2, 8, most_stages=4),
        Launch(64, 2, 8, scale_sums=False),
        Launch(64, 4, 4, 2, 1, 1, scale_sums=False),
        Launch(64, 4, 4, 1, 1, 1, scale_sums=False),
        Launch(64, 4, 2, 1, 1, 2, scale_sums=False),
        Launch(64, 2, 4, 1, 1, 2),
        Launch(64, 2, 4, 2, 1, 1),
    ],
    128: [
        Launch(128, 2, 8, scale_sums=False),
        Launch(128, 2, 4, scale_sums=False),
        Launch(128, 2, 4, 1, 1, 2, scale_sums=False),
        Launch(128, 1, 8, 1, 1, 1, scale_sums=False),
        Launch(64, 2, 8),
    ],
}


def tile_bytes_of(kind):
    bits, group, zero, _ = kind
    return 1024 * bits + 128 * 128 // group + (64 * 128 // group if zero < 0 else 0)


def fits(how, kind=FOUR):
    threads = 32 * how.warps_out * how.warps_in
    return how.stages(tile_bytes_of(kind), H200) >= 2 and threads * how.resident <= 2048


def label(how):
    text = f"{how.n_tile}:{how.strips}x{how.warps_out}o{how.warps_in}i t{how.tiles} r{how.resident}"
    return (
        text
        + (" z" if how.zero_sums else "" if how.scale_sums else " c")
        + (f" s{how.most_stages}" if how.most_stages != 6 else "")
    )


def warm(job):
    arch, how, kind, bfloat = job
    try:
        if arch == "dense":
            mma._dense_kernel(kind, bfloat, ARCH, torch.device("cuda", 0))
        elif arch == "hopper":
            cuda._kernel(how, kind[0], kind[1], kind[2], tile_bytes_of(kind), bfloat, kind[3], 0)
        else:
            mma._kernel(how, kind, tile_bytes_of(kind), bfloat, arch, torch.device("cuda", 0))
    except Exception:
        return f"COMPILE FAILED {job}\n{traceback.format_exc()[-600:]}"
    return None


def warm_all(jobs):
    started = time.time()
    with futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        for said in pool.map(warm, list(dict.fromkeys(jobs)), chunksize=2):
            if said:
                print(said)
    print(f"compiled {len(set(jobs))} kernels in {time.time() - started:.0f} s", flush=True)


BAD = 0


def judge(name, y, x, weight):
    global BAD
    exact = x.double() @ weight.dequantize(torch.float64).t()
    ours, theirs = ((each.double() - exact).norm() / exact.norm() for each in (y, reference(x, weight)))
    if bool(ours < 1.35 * theirs):
        return f"{float(ours / theirs):.2f}"
    BAD += 1
    wrong = ((y.double() - exact).abs() > 0.02 * exact.abs().max()) | ~torch.isfinite(y)
    places = wrong.nonzero()
    print(
        f"BAD {name}: error {float(ours):.2e}, reference {float(theirs):.2e}; {len(places)} of {wrong.numel()} wrong; "
        f"rows {wrong.any(1).nonzero().flatten()[:6].tolist()}, outputs {wrong.any(0).nonzero().flatten()[:10].tolist()}"
    )
    for m, n in places[:3].tolist():
        print(f"   y[{m}, {n}] = {float(y[m, n]):.5g}, expected {float(exact[m, n]):.5g}")
    return "BAD"


def run(x, weight, how=None, grid=0, arch=ARCH):
    torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype, device="cuda")
    if how is None:
        return cuda.launch(x, weight, architecture=arch)
    return cuda.launch(x, weight, (how, grid or P * how.resident), architecture=arch)


def kinds():
    """(bits, group size, symmetric, bfloat, rows): thinned."""
    n = 0
    for bits in (4, 3, 2, 8):
        for group in (32, 64, 128, 256, -1):
            for symmetric in (True, False):
                n += 1
                yield bits, group, symmetric, (n + n // 4) % 2 == 0, (1, 13, 40, 64)[n % 4]


def small_cut(rows, zero_sums=False):
    n = 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Launch(n, 2, 4, 2, 1, 1, zero_sums=zero_sums)


def check():
    torch.manual_seed(0)
    jobs, todo = [], []
    for bits, group, symmetric, bfloat, rows in kinds():
        weight = random_weight(544, 1056, bits=bits, group_size=group, symmetric=symmetric)
        packed = prepare(weight)
        kind = mma._kind_of(packed)
        table, _ = launch_for(rows, *packed.tiles.shape, bits, P, H200)
        cuts = [table] + ([replace(table, zero_sums=True)] if table.n_tile <= 16 and not (bits == 8 and bfloat) else [])
        if table.n_tile == 64 and group in (32, 128):
            cuts.append(replace(table, scale_sums=False))
        todo.append((weight, packed, bfloat, rows, cuts))
        jobs += [(ARCH, cut, kind, bfloat) for cut in cuts]
        if group in (32, 128, -1):
            jobs.append(("dense", None, kind, bfloat))
    jobs += [(ARCH, how, FOUR, False) for cuts in CUTS.values() for how in cuts if fits(how)]
    jobs += [("sm_90", how, FOUR, False) for how in (SMALL[0], CUTS[16][2], CUTS[64][0])]
    warm_all(jobs)
    line = []
    for weight, packed, bfloat, rows, cuts in todo:
        weight, packed = weight.to("cuda"), packed.to("cuda")
        x = torch.randn(rows, 1056, dtype=torch.bfloat16 if bfloat else torch.float16, device="cuda")
        name = f"{weight.bits} bits/{weight.group_size} zero {packed.zero} {x.dtype} M={rows}"
        for cut in cuts:
            line.append(judge(f"{name} {label(cut)}", run(x, packed, cut), x, weight))
        if weight.group_size in (32, 128, 1056, -1):
            y = x.new_empty(rows, 544)
            mma._by_dense(x, packed, y, ARCH)
            line.append("d" + judge(f"{name} dense", y, x, weight))
    print("kinds of weights, error over the reference's:", *line, flush=True)
    line = []
    shapes = ((96, 288), (77, 200), (1000, 4224), (4096, 4096), (64, 12288))
    weights = [random_weight(*shape, bits=4, group_size=128, symmetric=True, device="cuda") for shape in shapes]
    for n_tile, cuts in CUTS.items():
        for n, how in enumerate(each for each in cuts if fits(each)):
            for m, weight in enumerate(weights):
                rows = (n_tile, n_tile - 3, 2 * n_tile + 5, 1)[(n + m) % 4]
                x = torch.randn(rows, weight.in_features, dtype=torch.float16, device="cuda")
                packed = prepare(weight)
                grid = (P * how.resident, 100, 1, 7)[(n + 2 * m) % 4]
                ours = run(x, packed, how, grid)
                line.append(
                    judge(
                        f"{weight.out_features}x{weight.in_features} M={rows} {label(how)} grid {grid}", ours, x, weight
                    )
                )
                again = [torch.equal(run(x, packed, how, grid), ours) for _ in range(4)]
                if not all(again):
                    print(
                        f"NOT REPRODUCIBLE {label(how)} {weight.out_features}x{weight.in_features} M={rows} grid {grid}"
                    )
    for how in (SMALL[0], CUTS[16][2], CUTS[64][0]):
        x = torch.randn(how.n_tile, 4096, dtype=torch.float16, device="cuda")
        line.append("p" + judge(f"sm_90 {label(how)}", run(x, prepare(weights[3]), how, arch="sm_90"), x, weights[3]))
    shuffled = random_weight(512, 1024, bits=4, group_size=128, shuffled=True, device="cuda")
    packed = prepare(shuffled)
    x = torch.randn(5, 1024, dtype=torch.float16, device="cuda")
    line.append("s" + judge("activation order", run(x.index_select(1, packed.order), packed), x, shuffled))
    x = torch.randn(200, 4096, dtype=torch.float16, device="cuda")
    line.append("m" + judge("200 rows, measured", run(x, prepare(weights[3])), x, weights[3]))
    print("cuts:", *line)
    print(f"{BAD} BAD", flush=True)


def random_tiles(inputs, outputs, bits):
    blocks, k_tiles = -(-outputs // 64), -(-inputs // 128)
    tiles = torch.randint(0, 256, (blocks, k_tiles, 1024 * bits + 128), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(blocks, k_tiles, 64, device="cuda") * 0.01 + 0.005).half()
    tiles[..., 1024 * bits :] = scales.view(torch.uint8)
    return TiledWeight(tiles, None, bits, 128, 2 ** (bits - 1), torch.float16, inputs, outputs)


def timings():
    from gpu_matmul import microseconds, random_rows, rotated, time_dense, copies

    kind = {bits: (bits, 128, 2 ** (bits - 1), False) for bits in (2, 3, 4, 8)}
    other = {n: [CUTS[n][0], CUTS[n][2], CUTS[n][4], CUTS[n][7]] for n in (8, 16)}
    jobs = [(ARCH, how, FOUR, False) for cuts in CUTS.values() for how in cuts if fits(how)]
    jobs += [
        (ARCH, how, kind[bits], False)
        for n in (8, 16)
        for how in other[n]
        for bits in (2, 3, 8)
        if fits(how, kind[bits])
    ]
    jobs += [("sm_90", cuts[i], FOUR, False) for cuts in CUTS.values() for i in (0, 2) if fits(cuts[i])]
    for outputs, inputs in ((14336, 4096), (28672, 8192), (49152, 12288)):
        for rows in (1, 16, 32, 64):
            how, _ = cuda.launch_for(rows, outputs // 64, inputs // 128, 4224, 4, P)
            jobs.append(("hopper", how, FOUR, False))
    jobs.append(("dense", None, FOUR, False))
    warm_all(jobs)
    # The same launches with another card's pipeline depth, by most_stages.
    for inputs, outputs in ((4096, 14336), (8192, 28672), (12288, 49152)):
        weights = rotated(random_tiles(inputs, outputs, 4))
        blocks, k_tiles, _ = weights[0].tiles.shape
        dense = copies(torch.randn(outputs, inputs, dtype=torch.float16, device="cuda"))
        for rows in (1, 8, 16, 32, 64, 128):
            x = random_rows(rows, inputs)
            n_tile = max(8, rows)
            found = {}
            cuts = [how for how in CUTS[n_tile] if fits(how)]
            if rows == 8:
                cuts = cuts[:5]
            for how in cuts:
                most = P * how.resident
                grids = {most}
                tiles = -(-blocks // how.blocks) * -(-rows // how.n_tile)
                if tiles <= 2 * most and how.n_tile >= 32:
                    grids.add(-(-tiles // -(-tiles // most)))
                if how.n_tile <= 16 and how.resident > 1 and how in (CUTS[n_tile][0], CUTS[n_tile][2]):
                    grids.add(P)
                for grid in grids:
                    name = label(how) + ("" if grid == most else f" g{grid}")
                    try:
                        found[name] = microseconds(
                            [lambda w=w: cuda.launch(x, w, (how, grid), architecture=ARCH) for w in weights], 11
                        )
                    except Exception as error:
                        print("FAILED", name, str(error)[:200])
            for i in (0, 2):
                how = CUTS[n_tile][i]
                if fits(how):
                    found["PDL " + label(how)] = microseconds(
                        [lambda w=w: cuda.launch(x, w, (how, P * how.resident), architecture="sm_90") for w in weights],
                        11,
                    )
            ranked = sorted(found.items(), key=lambda each: each[1])
            base = f"cublas {time_dense(x, dense):.1f}"
            if rows in (1, 16, 32, 64):
                base += f" hopper {microseconds([lambda w=w: cuda.launch(x, w) for w in weights], 11):.1f}"
            if rows == 128:
                y = x.new_empty(rows, outputs)
                base += f" dense+cublas {microseconds([lambda w=w: mma._by_dense(x, w, y, ARCH) for w in weights[:2]], 5):.1f}"
            print(f"{inputs}x{outputs} M={rows} [{base}] " + "; ".join(f"{n} {t:.1f}" for n, t in ranked), flush=True)
        del weights, dense
    for bits in (2, 3, 8):
        weights = rotated(random_tiles(8192, 28672, bits))
        for rows in (1, 16):
            x, found = random_rows(rows, 8192), {}
            for how in other[max(8, rows)]:
                if fits(how, kind[bits]):
                    found[label(how)] = microseconds(
                        [lambda w=w: cuda.launch(x, w, (how, P * how.resident), architecture=ARCH) for w in weights], 11
                    )
            print(
                f"8192x28672 {bits} bits M={rows} "
                + "; ".join(f"{n} {t:.1f}" for n, t in sorted(found.items(), key=lambda e: e[1])),
                flush=True,
            )


if __name__ == "__main__":
    started = time.time()
    check() if sys.argv[1] == "check" else timings()
    print(f"{sys.argv[1]}: {time.time() - started:.0f} s")
