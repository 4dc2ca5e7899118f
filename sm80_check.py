"""Round of checks and timings of the mma.sync path (not to be merged).   python3 sm80_check.py SECONDS"""

import json
import multiprocessing
import os
import sys
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_CACHE_PATH"], os.environ["CUDA_CACHE_MAXSIZE"] = "/tmp/jit", str(2**32 - 1)
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
STARTED = float(os.environ.setdefault("SM80_STARTED", str(time.time())))
import torch  # noqa: E402
from kernels.random_weights import random_weight  # noqa: E402

from tersor.kernels import quantized_matmul_cuda as cuda  # noqa: E402
from tersor.kernels import quantized_matmul_mma as mma  # noqa: E402
from tersor.kernels.quantized_matmul import reference  # noqa: E402
from tersor.kernels.quantized_matmul_mma import CANDIDATES, Launch, SharedMemory, candidates  # noqa: E402
from tersor.kernels.tiled_weight import TiledWeight, prepare  # noqa: E402

OUT = Path(os.environ.get("OUT", "/tmp/sm80_out"))
ARCH = "compute_80"
P = 132
H200 = SharedMemory.of((9, 0))
FOUR = (4, 128, 8, False)
SHAPES = ((8192, 28672), (4096, 14336), (12288, 49152))
TIMED_ROWS = (1, 16, 64, 8, 32, 128)
SMALL_SHAPES = ((96, 288), (77, 200), (1000, 4224), (4096, 4096), (64, 12288))
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
    return how.stages(tile_bytes_of(kind), H200) >= 2 and how.threads * how.resident <= 2048


def of_bits(bits):
    return bits, 128, 2 ** (bits - 1), False


def all_cuts(n_tile, kind=FOUR):
    """Candidates first."""
    found = [*candidates(n_tile, tile_bytes_of(kind), kind[0], False, H200), *(CUTS[n_tile] if kind == FOUR else [])]
    return [how for how in dict.fromkeys(found) if fits(how, kind)]


def say(*words):
    print(f"[{time.time() - STARTED:5.1f}]", *words, flush=True)


def record(name, **what):
    with (OUT / name).open("a") as file:
        file.write(json.dumps(what) + "\n")


def records(name):
    path = OUT / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kinds():
    """(bits, group size, symmetric, bfloat, rows): thinned."""
    n = 0
    for bits in (4, 3, 2, 8):
        for group in (32, 64, 128, 256, -1):
            for symmetric in (True, False):
                n += 1
                yield bits, group, symmetric, (n + n // 4) % 2 == 0, (1, 13, 40, 64)[n % 4]


# ---------------------------------------------------------------------------------------------- compiling


def warm(job):
    arch, how, kind, bfloat = job
    try:
        device = torch.device("cuda", 0)
        if arch == "dense":
            mma._dense_kernel(kind, bfloat, ARCH, device)
        elif arch == "hopper":
            cuda._kernel(how, kind[0], kind[1], kind[2], tile_bytes_of(kind), bfloat, kind[3], 0)
        else:
            mma._kernel(how, kind, tile_bytes_of(kind), bfloat, arch, device)
    except Exception as error:
        return f"COMPILE FAILED {job}: {str(error)[:300]}"
    return None


def kind_cases():
    for bits, group, symmetric, bfloat, rows in kinds():
        tile_group = min(group if group > 0 else 128, 128)
        kind = (bits, tile_group, 2 ** (bits - 1) if symmetric else -1, False)
        table = candidates(rows, tile_bytes_of(kind), bits, bfloat, H200)[0]
        cuts = [table] + ([replace(table, zero_sums=True)] if table.n_tile <= 16 and not (bits == 8 and bfloat) else [])
        if table.n_tile == 64 and group in (32, 128):
            cuts.append(replace(table, scale_sums=False))
        yield (bits, group, symmetric, bfloat, rows), kind, cuts


def jobs():
    found = [(ARCH, how, FOUR, False) for n_tile in CUTS for how in all_cuts(n_tile)]
    found.append(("dense", None, FOUR, False))
    for outputs, inputs in ((14336, 4096), (28672, 8192), (49152, 12288)):
        for rows in (1, 8, 16, 32, 64, 128):
            how, _ = cuda.launch_for(rows, outputs // 64, inputs // 128, 4224, 4, P)
            found.append(("hopper", how, FOUR, False))
    found += [(ARCH, how, of_bits(b), False) for b in (2, 3, 8) for n in (8, 16) for how in all_cuts(n, of_bits(b))]
    for (_, group, _, bfloat, _), kind, cuts in kind_cases():
        found += [(ARCH, cut, kind, bfloat) for cut in cuts]
        if group in (32, 128, -1):
            found.append(("dense", None, kind, bfloat))
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------- correctness


def ratio(y, x, weight):
    """Our error over the reference's, and a word on what is wrong where it is too large."""
    exact = x.double() @ weight.dequantize(torch.float64).t()
    ours, theirs = (float((each.double() - exact).norm() / exact.norm()) for each in (y, reference(x, weight)))
    if ours < 1.35 * theirs:
        return round(ours / theirs, 2), ""
    wrong = ((y.double() - exact).abs() > 0.02 * exact.abs().max()) | ~torch.isfinite(y)
    rows, outputs = wrong.any(1).nonzero().flatten()[:6].tolist(), wrong.any(0).nonzero().flatten()[:8].tolist()
    return round(ours / theirs, 2), f"{int(wrong.sum())} of {wrong.numel()} wrong, rows {rows}, outputs {outputs}"


def poison(x, weight):
    torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype, device="cuda")


def check_cuts(n_tile):
    """Each cut over shapes and grids. An illegal instruction ends this process only."""
    torch.manual_seed(0)
    done = {each["cut"] for each in records("check.jsonl")}
    weights = [random_weight(*shape, bits=4, group_size=128, symmetric=True, device="cuda") for shape in SMALL_SHAPES]
    tiled = [prepare(weight) for weight in weights]
    for n, how in enumerate(all_cuts(n_tile)):
        if str(how) in done:
            continue
        bad, ratios, at = [], [], ""
        try:
            for m, (weight, packed) in enumerate(zip(weights, tiled, strict=True)):
                rows = (n_tile, n_tile - 3, 2 * n_tile + 5, 1)[(n + m) % 4]
                grid = (P * how.resident, 100, 1, 7)[(n + 2 * m) % 4]
                at = f"{weight.out_features}x{weight.in_features} M={rows} grid {grid}"
                x = torch.randn(rows, weight.in_features, dtype=torch.float16, device="cuda")
                poison(x, weight)
                y = cuda.launch(x, packed, (how, grid), architecture=ARCH)
                torch.cuda.synchronize()
                found, why = ratio(y, x, weight)
                ratios.append(found)
                if why:
                    bad.append(f"{at}: {why}")
                if not all(torch.equal(cuda.launch(x, packed, (how, grid), architecture=ARCH), y) for _ in range(4)):
                    bad.append(f"{at}: not reproducible")
        except Exception as error:
            record("check.jsonl", cut=str(how), ok=False, why=f"{at}: {str(error)[:160]}")
            os._exit(3)
        record("check.jsonl", cut=str(how), ok=not bad, ratios=ratios, why="; ".join(bad)[:600])


def check_kinds():
    torch.manual_seed(0)
    done = {each["kind"] for each in records("kinds.jsonl")}
    for case, kind, cuts in kind_cases():
        bits, group, symmetric, bfloat, rows = case
        if str(case) in done:
            continue
        bad, ratios = [], []
        try:
            weight = random_weight(544, 1056, bits=bits, group_size=group, symmetric=symmetric, device="cuda")
            packed = prepare(weight)
            if mma._kind_of(packed) != kind:
                bad.append(f"kind is {mma._kind_of(packed)}, thought {kind}")
            x = torch.randn(rows, 1056, dtype=torch.bfloat16 if bfloat else torch.float16, device="cuda")
            for cut in cuts:
                poison(x, weight)
                found, why = ratio(cuda.launch(x, packed, (cut, P * cut.resident), architecture=ARCH), x, weight)
                ratios.append(found)
                if why:
                    bad.append(f"{cut}: {why}")
            if group in (32, 128, -1):
                y = x.new_empty(rows, 544)
                mma._by_dense(x, packed, y, ARCH)
                found, why = ratio(y, x, weight)
                ratios.append(found)
                if why:
                    bad.append(f"dense: {why}")
        except Exception as error:
            record("kinds.jsonl", kind=str(case), ok=False, why=str(error)[:160])
            os._exit(3)
        record("kinds.jsonl", kind=str(case), ok=not bad, ratios=ratios, why="; ".join(bad)[:600])


def check_rest():
    torch.manual_seed(0)
    try:
        shuffled = random_weight(512, 1024, bits=4, group_size=128, shuffled=True, device="cuda")
        packed = prepare(shuffled)
        x = torch.randn(5, 1024, dtype=torch.float16, device="cuda")
        y = cuda.launch(x.index_select(1, packed.order), packed, architecture=ARCH)
        record("rest.jsonl", what="activation order", found=ratio(y, x, shuffled))
        weight = random_weight(4096, 4096, bits=4, group_size=128, symmetric=True, device="cuda")
        packed = prepare(weight)
        for rows in (1, 200):
            x = torch.randn(rows, 4096, dtype=torch.float16, device="cuda")
            started = time.time()
            y = cuda.launch(x, packed, architecture=ARCH)
            torch.cuda.synchronize()
            seconds = round(time.time() - started, 2)
            way = mma.chosen(rows, x.dtype, packed, ARCH)
            record("rest.jsonl", what=f"{rows} rows, measured", found=ratio(y, x, weight), seconds=seconds, chosen=way)
    except Exception as error:
        record("rest.jsonl", what="FAILED", found=str(error)[:300])


# ---------------------------------------------------------------------------------------------- timings


def is_good():
    """By cut, from the checks."""
    return {each["cut"]: each["ok"] for each in records("check.jsonl")}


def bench():
    """The benchmark as it is, without candidates that failed."""
    sys.path.insert(0, "benchmarks")
    import gpu_matmul

    good = is_good()
    for n_tile, cuts in list(CANDIDATES.items()):
        CANDIDATES[n_tile] = tuple(how for how in cuts if good.get(str(how), True)) or cuts[:1]
    candidates.cache_clear()
    sys.argv = ["gpu_matmul.py", "--mma", "--out", str(OUT / "gpu_matmul_mma.md")]
    gpu_matmul.main()


def random_tiles(inputs, outputs, bits):
    blocks, k_tiles = -(-outputs // 64), -(-inputs // 128)
    tiles = torch.randint(0, 256, (blocks, k_tiles, 1024 * bits + 128), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(blocks, k_tiles, 64, device="cuda") * 0.01 + 0.005).half()
    tiles[..., 1024 * bits :] = scales.view(torch.uint8)
    return TiledWeight(tiles, None, bits, 128, 2 ** (bits - 1), torch.float16, inputs, outputs)


def grids(how, rows, blocks):
    most = P * how.resident
    found = {mma.grid_for(how, rows, blocks, 64, P), most}
    if how.resident > 1:
        found.add(P)
    return found


def rank():
    """Every cut and grid, by the benchmark's method, one JSON line each. Goes on where a process before has ended."""
    sys.path.insert(0, "benchmarks")
    import gpu_matmul

    good, done = is_good(), {each["at"] for each in records("rank.jsonl")}
    todo = [((inputs, outputs), 4, TIMED_ROWS) for inputs, outputs in SHAPES]
    todo[1:1] = [((8192, 28672), bits, (1, 16)) for bits in (3, 2, 8)]
    for (inputs, outputs), bits, all_rows in todo:
        weights = None
        for rows in all_rows:
            n_tile = max(8, rows)
            for how in all_cuts(n_tile, of_bits(bits)):
                for grid in grids(how, rows, outputs // 64):
                    at = f"{inputs}x{outputs} {bits} bits M={rows} {how} g{grid}"
                    if at in done or not good.get(str(how), True):
                        continue
                    try:
                        if weights is None:
                            weights = gpu_matmul.rotated(random_tiles(inputs, outputs, bits))
                        x = gpu_matmul.random_rows(rows, inputs)
                        calls = [
                            lambda w=w, x=x, how=how, grid=grid: cuda.launch(x, w, (how, grid), architecture=ARCH)
                            for w in weights
                        ]
                        us = round(gpu_matmul.microseconds(calls, 11), 1)
                    except Exception as error:
                        record("rank.jsonl", at=at, why=str(error)[:160])
                        os._exit(3)
                    where = {"shape": f"{inputs}x{outputs}", "bits": bits, "rows": rows}
                    record("rank.jsonl", at=at, **where, cut=str(how), grid=grid, us=us)


# ---------------------------------------------------------------------------------------------- phases


def left(end):
    return end - (time.time() - STARTED)


def children(context, tasks, end):
    """Each in a process of its own, started again where it ended with 3, until `end`, in seconds from the start."""
    running = {name: context.Process(target=task, args=args) for name, (task, args) in tasks.items()}
    for process in running.values():
        process.start()
    while running and left(end) > 0:
        time.sleep(0.1)
        for name, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            if process.exitcode == 3 and left(end) > 1:
                task, args = tasks[name]
                running[name] = context.Process(target=task, args=args)
                running[name].start()
                continue
            if process.exitcode != 0:
                say(f"{name} ended with {process.exitcode}")
            del running[name]
    for name, process in running.items():
        say(f"{name} ran out of time")
        process.kill()
        process.join()


def touch():
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    except Exception:
        os._exit(4)


def main(seconds):
    OUT.mkdir(parents=True, exist_ok=True)
    say("torch is there")
    context = multiprocessing.get_context("fork")
    test = context.Process(target=touch)
    test.start()
    test.join()
    if test.exitcode != 0:
        say("forked processes see no GPU; spawning")
        context = multiprocessing.get_context("spawn")
    todo, workers = jobs(), min(15, os.cpu_count() or 4)
    with futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = [pool.submit(warm, job) for job in todo]
        for each in futures.as_completed(waiting):
            if each.result():
                print(each.result())
    say(f"compiled {len(todo)} kernels")

    tasks = {f"cuts of {n}": (check_cuts, (n,)) for n in CUTS} | {"kinds": (check_kinds, ()), "rest": (check_rest, ())}
    children(context, tasks, min(seconds - 40, seconds * 0.5))
    cuts, kinds_found = records("check.jsonl"), records("kinds.jsonl")
    expected = sum(len(all_cuts(n)) for n in CUTS if n != 128) + len([h for h in all_cuts(128) if h.n_tile == 128])
    say(
        f"cuts: {sum(each['ok'] for each in cuts)} of {expected} right; kinds: {sum(e['ok'] for e in kinds_found)} of 40"
    )
    ratios = [value for each in cuts + kinds_found for value in each.get("ratios", [])]
    say("error over the reference's:", min(ratios, default=0), "to", max(ratios, default=0))
    for each in cuts + kinds_found:
        if not each["ok"]:
            print("BAD", each.get("cut") or each.get("kind"), each["why"][:300])
    for each in records("rest.jsonl"):
        print(each)

    children(context, {"bench": (bench, ())}, seconds - 14)
    say("benchmark done")
    children(context, {"rank": (rank, ())}, seconds - 2)
    found = {}
    for each in records("rank.jsonl"):
        if "us" in each:
            found.setdefault((each["shape"], each["bits"], each["rows"]), []).append(each)
        else:
            print("FAILED", each["at"], each["why"][:120])
    for (shape, bits, rows), times in found.items():
        best = sorted(times, key=lambda each: each["us"])[:3]
        print(
            shape,
            bits,
            "bits M =",
            rows,
            "|",
            "; ".join(f"{e['us']} {e['cut']} g{e['grid']}" for e in best),
            f"| of {len(times)}",
        )
    say("end")


if __name__ == "__main__":
    main(float(sys.argv[1]))
