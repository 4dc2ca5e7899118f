"""What SHViT-S4 gains over MobileViTV2-1.0 in several forms of both, in one run on a GPU, and where the time goes.

    python benchmarks/shvit_attempts.py [--write] [--quick]

Published: SHViT-S4 is 3.3 times as fast as MobileViTV2-1.0 on a GPU, in throughput at a large batch. Images of 256 x 256 pixels,
random weights; the two models of a row run in turns, and medians count. Folded: BatchNorm folded into the convolutions of both,
by `fuse()` for ours, layer by layer for timm's. Graph: one CUDA graph, captured once, replayed. TF32: float32 whose products are
rounded to 10 bits, torch's "high". Compiled: torch.compile; "reduce-overhead" is its mode with CUDA graphs. Busy: the share of
the time in which the GPU ran a kernel, from the profile. Empty: not measured. Without a graph, batches of 1 and 64 wait for the
CPU, where other processes ran meanwhile: such rows tell less than those with one.

Needs timm.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import (
    command,
    gpu,
    kept_numbers,
    machine,
    recorded,
    refuse_to_keep_quick,
    seconds_of,
    write_numbers,
    write_table,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tersor
from tersor.layers.conv_norm import fold

SIDE = 256
BATCHES = (1, 64, 256)
TURNS = 20
FORMS = {  # dtype, channels last, how it is called
    "as published": ("float32", False, "plain"),
    "folded": ("float32", False, "eager"),
    "folded, channels last": ("float32", True, "eager"),
    "folded, graph": ("float32", False, "graph"),
    "folded, TF32, graph": ("TF32", False, "graph"),
    "folded, channels last, TF32, graph": ("TF32", True, "graph"),
    "folded, float16": ("float16", False, "eager"),
    "folded, float16, graph": ("float16", False, "graph"),
    "folded, channels last, float16, graph": ("float16", True, "graph"),
    "folded, channels last, bfloat16, graph": ("bfloat16", True, "graph"),
    "folded, compiled": ("float32", False, "default"),
    "folded, compiled, reduce-overhead": ("float32", False, "reduce-overhead"),
    "folded, channels last, float16, reduce-overhead": ("float16", True, "reduce-overhead"),
}


def folded_peer(model: nn.Module) -> nn.Module:
    """timm's convolutions with the BatchNorm behind them folded in, in place; what it also activates stays."""
    for part in model.modules():
        convolution, norm = getattr(part, "conv", None), getattr(part, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            part.conv = fold(convolution, norm)
            part.bn = getattr(norm, "act", nn.Identity())
    return model


def models(*, plain: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours: Any = tersor.models.create("shvit_s4").eval()
    peer = timm.create_model("mobilevitv2_100").eval()
    return {"ours": ours, "peer": peer} if plain else {"ours": ours.fuse().eval(), "peer": folded_peer(peer).eval()}


def callable_of(model: nn.Module, image: Tensor, how: str) -> Callable[[], object]:
    if how == "graph" and image.is_cuda:
        return recorded(lambda: model(image))
    if how in ("default", "reduce-overhead"):
        compiled = torch.compile(model, dynamic=False, mode=how)
        return lambda: compiled(image)
    return lambda: model(image)


@torch.no_grad()
def measured(form: str, batch: int, device: str, turns: int) -> dict[str, float]:
    """Milliseconds of both."""
    kind, last, how = FORMS[form]
    torch.set_float32_matmul_precision("high" if kind == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "TF32"
    dtype = torch.float32 if kind == "TF32" else getattr(torch, kind)
    memory = torch.channels_last if last else torch.contiguous_format
    image = torch.randn(batch, 3, SIDE, SIDE).to(device, dtype).contiguous(memory_format=memory)
    calls = {
        who: callable_of(model.to(device, dtype).to(memory_format=memory), image, how)
        for who, model in models(plain=how == "plain").items()
    }
    for call in calls.values():
        for _ in range(3 if turns > 1 else 1):
            call()
    seconds: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(turns):
        for who, call in calls.items():
            seconds[who].append(seconds_of(call, device))
    return {who: 1e3 * statistics.median(each) for who, each in seconds.items()}


@torch.no_grad()
def profiled(batch: int, device: str) -> dict[str, Any]:
    """Of both, folded, float32: how many kernels, the GPU's busy share, and the kernels that take the most."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {}
    image = torch.randn(batch, 3, SIDE, SIDE, device=device)
    for who, model in models(plain=False).items():
        model.to(device)
        for _ in range(3):
            model(image)
        wall = statistics.median(seconds_of(lambda model=model: model(image), device) for _ in range(5))
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as run:
            seconds_of(lambda model=model: model(image), device)
        kernels: dict[str, list[float]] = {}
        for event in run.events():
            if device != "cuda" or event.device_type == torch.autograd.DeviceType.CUDA:
                name = event.name.partition("<")[0].partition("(")[0].removeprefix("void ")[-60:]
                spent = kernels.setdefault(name, [0, 0.0])
                spent[0] += 1
                spent[1] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        whole = sum(each[1] for each in kernels.values())
        ranked = sorted(kernels.items(), key=lambda each: -each[1][1])[:6]
        found[who] = {
            "ms": 1e3 * wall, "kernels": int(sum(each[0] for each in kernels.values())), "busy": whole / 1e6 / wall,
            "top": [[name, int(count), spent / whole] for name, (count, spent) in ranked],
        }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    described = (__doc__ or "").strip().split("\n\n")
    lines = ["# SHViT-S4 beside MobileViTV2-1.0 in several forms", "", described[2], ""]
    heads = [f"batch {batch}, ms | ratio" for batch in BATCHES]
    lines += [f"| form of both | {' | '.join(heads)} |", "| --- |" + " ---: | ---: |" * len(BATCHES)]
    for form in FORMS:
        cells = []
        for batch in BATCHES:
            row = found["ms"].get(f"{form} {batch}")
            cells += [f"{row['ours']:.3g} / {row['peer']:.3g}", f"{row['peer'] / row['ours']:.2f}"] if row else ["", ""]
        lines += [f"| {form} | {' | '.join(cells)} |"]
    lines += ["", "ms: ours / the peer's; ratio: how many times as fast ours is.", ""]
    for batch, each in found["profile"].items():
        lines += [f"## Kernels at batch {batch}, folded, float32", ""]
        lines += [
            "| model | ms | kernels | busy | the kernels that take the most |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        for who, name in (("ours", "SHViT-S4"), ("peer", "MobileViTV2-1.0")):
            row = each[who]
            top = "; ".join(f"{share:.0%} `{kernel}` ({count})" for kernel, count, share in row["top"])
            lines += [f"| {name} | {row['ms']:.3g} | {row['kernels']} | {row['busy']:.0%} | {top} |"]
        lines += [""]
    return "\n".join([*lines, f"{found['where']}. `{found['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--quick", action="store_true", help="one image, one turn: whether it runs")
    given = parser.parse_args()
    refuse_to_keep_quick(given)
    where = gpu("timm") if given.device == "cuda" else machine()
    found: dict[str, Any] = kept_numbers("shvit_attempts") if given.write else {}
    found |= {"ms": {}, "profile": {}, "where": where, "command": command()}
    for batch in BATCHES[:1] if given.quick else (256, 1):
        found["profile"][str(batch)] = profiled(batch, given.device)
    for form in FORMS:
        for batch in BATCHES[:1] if given.quick else BATCHES:
            try:
                found["ms"][f"{form} {batch}"] = row = measured(form, batch, given.device, 1 if given.quick else TURNS)
                print(form, batch, {who: round(ms, 3) for who, ms in row.items()}, flush=True)
            except Exception as error:  # one form that does not run is no reason to lose the others
                print(form, batch, f"{type(error).__name__}: {error}"[:200], flush=True)
            torch.compiler.reset()
            if given.write:
                write_numbers("shvit_attempts", found)
                write_table("shvit_attempts", table(found))
    if given.quick:
        print(table(found))


if __name__ == "__main__":
    main()
