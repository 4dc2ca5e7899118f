"""Latency and peak memory of vision models beside the nearest models of timm, torchvision and others, in one run.

    python benchmarks/vision_latency.py [NAME...] [--device cuda] [--compile-seconds 85] [--turns 20] [--compile-only]

Images of one size, float32, random weights, batches of 1 and 64; the two models of a row run in turns, and medians count.
Compiled: torch.compile with its defaults. Memory: the weights, and what a run needs beyond them at its peak. SHViT and FMViT run
in their deployed form, as their papers measure them. On a CPU each pair has two cores of its own and two threads. Other cores of
the machines named below had work meanwhile, six of sixteen in the longer run.

--compile-only fills the compiler's cache (TORCHINDUCTOR_CACHE_DIR), so that a second call has the time for all.

Needs timm, and for a row each torchvision and fastervit; rows whose peer is not installed have our times alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import kept_numbers, peak_growth, processor, seconds_of, versions, write_numbers, write_table
from torch import nn

import tersor

BATCHES = (1, 64)
FORMS = ("eager", "compiled")
CORES = 2  # of a pair on a CPU
MOST = 12.0  # seconds for the turns of one cell; at least 3 turns


@dataclass(frozen=True)
class Pair:
    ours: str
    peer: str  # package:name
    side: int = 224
    claim: str = ""  # of the paper


PAIRS = (
    Pair("shvit_s4", "timm:mobilevitv2_100", 256, "3.3 times as fast on a GPU, 8.1 times on a CPU"),
    Pair("turbovit", "fastervit:faster_vit_0_224", 224, "3.21 times as fast at batch 1"),
    Pair("efficientformer_l1", "timm:mobilenetv2_140", 224, "as fast, on a phone"),
    Pair("fmvit", "timm:resnet101", 224, "about as fast, in TensorRT"),
    Pair("shvit_s4", "timm:shvit_s4", 256),
    Pair("efficientformer_l1", "timm:efficientformer_l1"),
    Pair("efficientformerv2_s0", "timm:efficientformerv2_s0"),
    Pair("mobilevitv2_100", "timm:mobilevitv2_100", 256),
    Pair("mobilevit_s", "timm:mobilevit_s", 256),
    Pair("hiera_tiny", "timm:hiera_tiny_224"),
    Pair("smt_t", "timm:pvt_v2_b1"),
    Pair("vssd_micro", "timm:pvt_v2_b1"),
    Pair("stvit_s", "timm:swin_tiny_patch4_window7_224"),
    Pair("svt_s", "timm:deit_small_patch16_224"),
    Pair("sret_t", "timm:deit_tiny_patch16_224"),
    Pair("efficientvmamba_t", "timm:deit_tiny_patch16_224"),
    Pair("pp_mobileseg_base", "torchvision:lraspp_mobilenet_v3_large"),
)


def our_model(pair: Pair) -> nn.Module:
    model: Any = tersor.models.create(pair.ours).eval()
    for deployed in ("fuse", "deploy"):
        if hasattr(model, deployed):
            model = getattr(model, deployed)()
    fixed: nn.Module = model.eval()
    return fixed


def peer_model(pair: Pair) -> nn.Module | str:
    """The peer, or why it is not there."""
    package, _, name = pair.peer.partition(":")
    try:
        if package == "timm":
            found: nn.Module = importlib.import_module("timm").create_model(name)
        elif package == "fastervit":
            found = getattr(importlib.import_module("fastervit.models.faster_vit"), name)()
        else:
            make = getattr(importlib.import_module("torchvision.models.segmentation"), name)
            found = make(weights=None, weights_backbone=None, num_classes=150)
    except Exception as error:  # whatever a package of others raises when it does not fit the torch that is there
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found.eval()


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call needs at its peak beyond what is held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return peak_growth(call)


@torch.no_grad()
def child(number: int, device: str, until: float, turns: int) -> None:
    """Prepare a pair, compile it until the clock says `until`, wait for a line, measure, print a row."""
    warnings.filterwarnings("ignore")
    pair = PAIRS[number]
    images = {batch: torch.randn(batch, 3, pair.side, pair.side, device=device) for batch in BATCHES}
    models: dict[str, nn.Module] = {"ours": our_model(pair).to(device)}
    row: dict[str, Any] = {"missing": {}}
    peer = peer_model(pair)
    if isinstance(peer, str):
        row["no peer"] = peer
    else:
        models["peer"] = peer.to(device)
    row["parameters"] = {who: sum(each.numel() for each in model.parameters()) for who, model in models.items()}
    calls: dict[tuple[str, str, int], Callable[[], object]] = {}
    for who, model in models.items():
        for batch, image in images.items():
            calls[who, "eager", batch] = functools.partial(model, image)
    for who, model in models.items():
        compiled = torch.compile(model, dynamic=False)
        for batch, image in images.items():
            if time.time() > until:
                row["missing"][f"{who} {batch}"] = "no time left to compile"
                continue
            try:
                compiled(image)
                calls[who, "compiled", batch] = functools.partial(compiled, image)
            except Exception as error:  # the compiler's errors are of many kinds
                row["missing"][f"{who} {batch}"] = type(error).__name__
    print("READY", flush=True)
    sys.stdin.readline()
    row["ms"], row["MiB"] = {}, {}
    for batch in BATCHES:
        for form in FORMS:
            pairs = {who: calls[who, form, batch] for who in models if (who, form, batch) in calls}
            seconds: dict[str, list[float]] = {who: [] for who in pairs}
            for who, call in pairs.items():
                weights = sum(each.nbytes for each in models[who].parameters())
                row["MiB"][f"{who} {form} {batch}"] = (weights + peak(call, device)) / 2**20
                seconds_of(call, device)
            started = time.perf_counter()
            for turn in range(turns):
                if turn >= 3 and time.perf_counter() - started > MOST:
                    break
                for who, call in pairs.items():
                    seconds[who].append(seconds_of(call, device))
            for who, each in seconds.items():
                row["ms"][f"{who} {form} {batch}"] = 1e3 * statistics.median(each)
    print("ROW " + json.dumps(row), flush=True)


def start(number: int, device: str, until: float, turns: int, cores: set[int] | None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", str(number), "--device", device, "--until", str(until)]
    command += ["--turns", str(turns)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        preexec_fn=None if cores is None else functools.partial(os.sched_setaffinity, 0, cores),
    )  # fmt: skip


def line_of(process: subprocess.Popen[str], start: str) -> str | None:
    """The next line that begins so; None where the process ends before."""
    assert process.stdout is not None
    return next((line for line in process.stdout if line.startswith(start)), None)


def measure(
    chosen: list[int], device: str, seconds: float, turns: int, keep: Callable[[int, Any], None], *, compile_only: bool
) -> None:
    """On a GPU all pairs are compiled at once, then measured one by one; on a CPU as many at once as there are cores for."""
    cores = sorted(os.sched_getaffinity(0))
    groups = [set(cores[n : n + CORES]) for n in range(0, len(cores) - CORES + 1, CORES)] or [set(cores)]
    at_once = len(chosen) if device == "cuda" else len(groups)
    for first in range(0, len(chosen), at_once):
        until = time.time() + seconds
        pinned = groups if device != "cuda" else [None] * len(chosen)
        part = zip(chosen[first : first + at_once], pinned, strict=False)
        running = {number: start(number, device, until, turns, where) for number, where in part}
        try:
            ready = [number for number, process in running.items() if line_of(process, "READY")]
            if compile_only:
                print(f"compiled: {[PAIRS[number].ours for number in ready]}", flush=True)
                continue
            if device != "cuda":
                for number in ready:
                    go(running[number])
            for number in ready:
                if device == "cuda":
                    go(running[number])
                said = line_of(running[number], "ROW ")
                keep(number, json.loads(said[4:]) if said else None)
            for number in set(running) - set(ready):
                keep(number, None)
        finally:
            for process in running.values():
                process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def table(results: dict[str, dict[str, Any]]) -> str:
    described = (__doc__ or "").strip().split("\n\n")
    lines = ["# Latency of vision models beside those of other libraries", "", described[2], ""]
    for found in results.values():
        lines += [f"## {found['machine']}", ""]
        for batch in BATCHES:
            lines += [f"Batch {batch}: milliseconds, ours / the peer's, and how many times as fast ours is.", ""]
            lines += ["| model | peer | image | eager | ratio | compiled | ratio | MiB, eager | the paper says |"]
            lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
            for pair in PAIRS:
                row = found["rows"].get(f"{pair.ours} {pair.peer}")
                if row is None:
                    continue
                cells = []
                for form in FORMS:
                    ours, peer = (row["ms"].get(f"{who} {form} {batch}") for who in ("ours", "peer"))
                    cells.append(" / ".join("-" if each is None else f"{each:.3g}" for each in (ours, peer)))
                    cells.append(f"{peer / ours:.2f}" if ours and peer else "")
                memory = (row["MiB"].get(f"{who} eager {batch}") for who in ("ours", "peer"))
                cells.append(" / ".join("-" if each is None else f"{each:.0f}" for each in memory))
                lines += [
                    f"| `{pair.ours}` | {pair.peer.replace(':', ' ')} | {pair.side} | {' | '.join(cells)} | {pair.claim} |"
                ]
            lines += [""]
        notes: list[str] = []
        missing: dict[str, list[str]] = {}
        for name, row in found["rows"].items():
            pair_of = name.replace(" ", " beside ")
            if "no peer" in row:
                notes.append(f"{pair_of}: the peer is left out ({row['no peer']}).")
            for why in dict.fromkeys(row["missing"].values()):
                what = ", ".join(each for each, reason in row["missing"].items() if reason == why)
                missing.setdefault(why, []).append(f"{name} ({what})")
        notes += [f"Not compiled: {why}: {'; '.join(cells)}." for why, cells in missing.items()]
        lines += [
            *(f"- {each}" for each in notes),
            *([""] if notes else []),
            f"{found['versions']}. `{found['command']}`",
            "",
        ]
    return "\n".join(lines)


def installed() -> list[str]:
    found = []
    for name in ("timm", "torchvision", "fastervit"):
        try:
            importlib.metadata.version(name)
            found.append(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(dict.fromkeys(pair.ours for pair in PAIRS)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile-seconds", type=float, default=85.0, help="after which nothing more is compiled")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--compile-only", action="store_true", help="measure nothing")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        torch.set_num_threads(CORES)
        child(given.child, given.device, given.until, given.turns)
        return
    if unknown := set(given.names) - {pair.ours for pair in PAIRS}:
        parser.error(f"{sorted(unknown)[0]!r} is compared with nothing; {', '.join({pair.ours for pair in PAIRS})} are")
    chosen = [n for n, pair in enumerate(PAIRS) if not given.names or pair.ours in given.names]
    results = kept_numbers("vision_latency")
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{processor()}, {CORES} threads"
    options = f"--device {given.device} --compile-seconds {given.compile_seconds:g} --turns {given.turns}"
    command = " ".join(["python benchmarks/vision_latency.py", *given.names, options])
    rows = results.get(given.device, {}).get("rows", {})
    before = results.get(given.device, {}).get("command", command)
    if command not in before:
        command = f"{before}`, then `{command}"

    def keep(number: int, row: dict[str, Any] | None) -> None:
        name = f"{PAIRS[number].ours} {PAIRS[number].peer}"
        print(name, json.dumps(row) if row else "FAILED", flush=True)
        if row:
            rows[name] = row
            results[given.device] = {
                "machine": where, "versions": versions(*installed()), "command": command, "rows": rows,
            }  # fmt: skip
            write_numbers("vision_latency", results)
            write_table("vision_latency", table(results))

    measure(chosen, given.device, given.compile_seconds, given.turns, keep, compile_only=given.compile_only)


if __name__ == "__main__":
    main()
