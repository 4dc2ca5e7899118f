"""What a longer sequence costs: time and peak memory of every sequence model of tersor, from 1,024 to 16,384 positions.

    python benchmarks/sequence_lengths.py --device cuda --write                    about two minutes on a GPU
    OMP_NUM_THREADS=1 python benchmarks/sequence_lengths.py --device cpu --write   about ten minutes of processor time
    ... --quick                                                                    whether it runs

With --write, a call goes on with the models that the kept .json does not hold; remove that file to begin anew.

Each model has one layer (algoformer its loop, twice, between two; thor one on either side) of width 128, two heads of 64 where it
has heads, and random weights: with its input, its head and all that surrounds the layer, in float32, on a GPU with products in
TF32. The input is one sequence on a CPU and four on a GPU. A forward pass is without gradients; forward and backward is that of
the mean square of the outputs, ebwm's that of its training loss, whose gradient goes through a gradient.

Times are the least of the repetitions, after a first pass: processor time on a CPU, time on the clock on a GPU. Memory is the
most that tensors took at once above weights and input. The exponent is that of time over length between 4,096 and 16,384: 1 is
linear, 2 is quadratic; below 1, a device that the shorter sequences do not fill.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    command,
    gpu,
    gpu_seconds,
    kept_numbers,
    machine,
    processor,
    refuse_to_keep_quick,
    write_numbers,
    write_table,
)
from torch import Tensor, nn

from tersor import models
from tersor.advise.complexity import slope

LENGTHS = (1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS, VOCAB = 128, 2, 32
LONGEST_PASS = {"cpu": 20.0, "cuda": 4.0}  # seconds; what would take longer, by the shorter lengths, is left out
MOST_BYTES = {"cpu": 5 * 2**30, "cuda": 100 * 2**30}
TURNS, ENOUGH = 5, 1.0  # repetitions, and seconds after which no more begin
PASSES = ("forward", "forward and backward")


@dataclass(frozen=True)
class Kind:
    """A model: its name among tersor's, its options for a length, and what it is given."""

    name: str
    system: str
    options: Callable[[int], dict[str, Any]]
    channels: int = 0  # of numbers; 0: tokens
    call: Callable[[Any, Tensor], Any] = lambda model, x: model(x)
    loss: Callable[[Any, Tensor], Tensor] | None = None  # instead of the mean square of what `call` gives


@dataclass(frozen=True)
class Row:
    model: str
    passed: str  # one of PASSES
    length: int
    seconds: float
    peak_bytes: int


def _rnn(function: str) -> Kind:
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "num_heads": HEADS, "n_layer": 1, "function": function}
    return Kind(f"flashrnn {function}", "flashrnn", lambda n: sizes)


_SPT = {"d_model": WIDTH, "heads": HEADS, "n_layers": 1, "pos": False}
_LMU = {"in_channels": WIDTH, "num_classes": VOCAB, "embed_dims": WIDTH}
_HYBRID = {"pattern": "M*", "hidden_size": WIDTH, "vocab_size": VOCAB, "num_attention_heads": HEADS}
_HYBRID |= {"num_key_value_heads": HEADS, "head_dim": 64, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 1}
_THOR = {
    "vocab": VOCAB,
    **{f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
       (("embed_dim", WIDTH), ("ffn_embed_dim", 4 * WIDTH), ("attention_heads", HEADS), ("layers", 1))},
}  # fmt: skip

KINDS = (
    Kind("attention (spt)", "spt", lambda n: _SPT, channels=1),
    Kind("attention in blocks (spt)", "spt", lambda n: {**_SPT, "local_block": 256}, channels=1),
    Kind("linformer", "linformer_lm",
         lambda n: {"dim": WIDTH, "seq_len": n, "depth": 1, "k": 128, "heads": HEADS, "num_tokens": VOCAB}),
    Kind("cot", "cot", lambda n: {"vocab": VOCAB, "maxlen": n, "dmodel": WIDTH, "head": HEADS, "num_layer": 1}),
    Kind("lifegpt", "lifegpt",
         lambda n: {"num_tokens": VOCAB, "max_seq_len": n, "dim": WIDTH, "depth": 1, "heads": HEADS}),
    Kind("algoformer", "algoformer",
         lambda n: {"d_in": 8, "max_len": n, "d_model": WIDTH, "heads": HEADS, "loops": 2}, channels=8),
    Kind("thor", "thor", lambda n: _THOR, call=lambda model, x: model(x, x)),
    Kind("ebwm", "ebwm",
         lambda n: {"embedding_dim": WIDTH, "num_transformer_blocks": 1, "multiheaded_attention_heads": HEADS},
         channels=WIDTH, call=lambda model, x: model.think(x, steps=1),
         loss=lambda model, x: model.training_loss(x)["loss"]),
    Kind("h3", "h3", lambda n: {"d_model": WIDTH, "n_layer": 1, "vocab_size": VOCAB}),
    Kind("s4", "s4", lambda n: {"d_model": WIDTH, "n_layers": 1}, channels=1),
    Kind("s4d", "s4d", lambda n: {"d_model": WIDTH, "n_layers": 1, "d_input": 1}, channels=1),
    Kind("mamba", "mamba", lambda n: {"d_model": WIDTH, "n_layer": 1, "vocab_size": VOCAB}),
    Kind("mamba2", "mamba2-130m", lambda n: {"d_model": WIDTH, "n_layer": 1, "vocab_size": VOCAB}),
    Kind("mamba2 and attention", "mamba_hybrid", lambda n: _HYBRID),
    Kind("longvq", "longvq", lambda n: {"d_model": WIDTH, "n_layers": 1}, channels=1),
    Kind("longvq_lm", "longvq_lm", lambda n: {"d_model": WIDTH, "n_layers": 1, "vocab_size": VOCAB}),
    Kind("lmuformer", "lmuformer", lambda n: _LMU, channels=WIDTH),
    Kind("spiking_lmuformer", "spiking_lmuformer", lambda n: _LMU, channels=WIDTH),
    *map(_rnn, ("lstm", "gru", "elman", "slstm")),
)  # fmt: skip


def passes(kind: Kind, model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    def forward() -> object:
        with torch.no_grad():
            return kind.call(model, x)

    def both() -> None:
        loss = kind.loss(model, x) if kind.loss else _first(kind.call(model, x)).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return dict(zip(PASSES, (forward, both), strict=True))


def _first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else _first(found[0])


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that tensors took at once, above what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler.kineto_results
    changes = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def seconds(call: Callable[[], object], device: str) -> float:
    found: list[float] = []
    while len(found) < TURNS and sum(found) < ENOUGH:
        if device == "cuda":
            found.append(gpu_seconds(call))
        else:
            began = time.process_time()
            call()
            found.append(time.process_time() - began)
    return min(found)


def expected(values: list[float]) -> float:
    """The next of these, at twice the length; nothing is expected after the first, which is there to be grown from."""
    return values[-1] * max(2.0, values[-1] / values[-2]) if len(values) > 1 else 4 * values[-1] if values else 0.0


def measure(kind: Kind, device: str, lengths: tuple[int, ...]) -> list[Row]:
    """A length that would take too long or too much is left out, and all that are longer."""
    rows: list[Row] = []
    for length in lengths:
        torch.manual_seed(0)
        batch = 4 if device == "cuda" else 1
        model = models.create(kind.system, **kind.options(length)).to(device).train()
        shape = (batch, length, kind.channels) if kind.channels else (batch, length)
        x = torch.randn(shape) if kind.channels else torch.randint(1, VOCAB, shape)
        calls = passes(kind, model, x.to(device))
        for name, call in calls.items():
            before = [row for row in rows if row.model == kind.name and row.passed == name]
            lost = length > lengths[0] and (not before or before[-1].length * 2 != length)
            slow = expected([row.seconds for row in before]) > LONGEST_PASS[device]
            if lost or slow or expected([float(row.peak_bytes) for row in before]) > MOST_BYTES[device]:
                continue
            try:
                if sum(row.seconds for row in before) < ENOUGH:  # else the pass that shows its memory warms up
                    call()
                most = peak_bytes(call, device)
                rows.append(Row(kind.name, name, length, seconds(call, device), most))
            except torch.OutOfMemoryError:
                print(f"{kind.name}, {name}, {length:,}: more memory than there is", flush=True)
            else:
                row = rows[-1]
                print(
                    f"{kind.name}, {name}, {length:,}: {1e3 * row.seconds:.2f} ms, {most / 2**20:,.0f} MiB", flush=True
                )
        del model, calls, x
        gc.collect()
    return rows


def table(rows: list[Row]) -> list[str]:
    lines = []
    order = [kind.name for kind in KINDS]
    for passed in PASSES:
        lines += ["", f"### {passed.capitalize()}", ""]
        lines += [
            "| model | ms at "
            + ", ".join(f"{n // 1024}k" for n in LENGTHS)
            + " | exponent | MiB at the same | exponent |"
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for name in sorted({row.model for row in rows}, key=order.index):
            mine = [row for row in rows if row.model == name and row.passed == passed]
            if not mine:
                continue
            times = [1e3 * row.seconds for row in mine]
            sizes = [row.peak_bytes / 2**20 for row in mine]
            missing = ["-"] * (len(LENGTHS) - len(mine))
            cells = [", ".join([_short(each) for each in values] + missing) for values in (times, sizes)]
            lengths = [row.length for row in mine]
            lines.append(
                f"| {name} | {cells[0]} | {_exponent(lengths, times)} | {cells[1]} | {_exponent(lengths, sizes)} |"
            )
    return lines


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _exponent(lengths: list[int], values: list[float]) -> str:
    long = [(n, value) for n, value in zip(lengths, values, strict=True) if n >= LENGTHS[-3]]
    if len(long) < 2:
        return ""
    found = f"{slope(*zip(*long, strict=True)):.2f}"
    return found if long[-1][0] == LENGTHS[-1] else f"{found} (to {long[-1][0] // 1024}k)"


def picture(rows: list[Row], device: str) -> None:
    """Time and memory of forward and backward over the length, beside lines that grow with n and with its square."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    names = list(dict.fromkeys(row.model for row in rows))
    for axis, read, label in (
        (axes[0], lambda row: row.seconds * 1e3, "ms"),
        (axes[1], lambda row: row.peak_bytes / 2**20, "MiB"),
    ):
        for at, name in enumerate(names):
            mine = [row for row in rows if row.model == name and row.passed == PASSES[1]]
            style = {"color": f"C{at % 10}", "linestyle": ("-", "--", ":")[at // 10], "marker": "o", "markersize": 3}
            axis.loglog([row.length for row in mine], [read(row) for row in mine], label=name, **style)
        low = min(read(row) for row in rows if row.passed == PASSES[1])
        for power in (1, 2):
            axis.loglog(LENGTHS, [low * (n / LENGTHS[0]) ** power / 2 for n in LENGTHS], color="0.6", linewidth=1)
            axis.annotate(("n", "n²")[power - 1], (LENGTHS[-1], low * 16**power / 2), color="0.4")
        axis.set(xlabel="length", ylabel=label, xticks=LENGTHS, xticklabels=[f"{n // 1024}k" for n in LENGTHS])
        axis.minorticks_off()
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("Forward and backward pass, " + (torch.cuda.get_device_name() if device == "cuda" else processor()))
    figure.savefig(Path(__file__).parents[1] / "docs" / "images" / f"sequence-lengths-{device}.png", dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--only", nargs="*", default=[], help="these models alone")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    torch.set_float32_matmul_precision("high")
    lengths = (256, 512) if asked.quick else LENGTHS
    kept = kept_numbers(f"sequence_lengths_{asked.device}").get("rows", []) if asked.write else []
    rows = [Row(**row) for row in kept]
    done = {row.model for row in rows}
    for kind in KINDS:
        if kind.name not in done and (not asked.only or kind.name in asked.only):
            try:
                rows += measure(kind, asked.device, lengths)
                if asked.write:  # after each model: what is done is kept where a call is stopped
                    keep(rows, asked.device)
            except Exception as error:  # the other models are still worth measuring
                print(f"{kind.name} failed: {error!r}", flush=True)
            if asked.device == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(table(rows)))
    if asked.write:
        picture(rows, asked.device)


def keep(rows: list[Row], device: str) -> None:
    name = f"sequence_lengths_{device}"
    about = (__doc__ or "").split("\n\n", 3)[3].strip()
    where = gpu() if device == "cuda" else machine()
    shown = f"drawn in docs/images/sequence-lengths-{device}.png"
    write_numbers(name, {"rows": [asdict(row) for row in rows], "where": where})
    most = f"{LONGEST_PASS[device]:.0f} s a pass, or more than {MOST_BYTES[device] / 2**30:.0f} GiB"
    left = f"-: it would take longer than {most}, by the shorter lengths."
    missing = [kind.name for kind in KINDS if all(row.model != kind.name for row in rows)]
    left += f" Not measured here: {', '.join(missing)}." if missing else ""
    text = ["# What a longer sequence costs", "", about, *table(rows), "", left, "", where, f"`{command()}`; {shown}"]
    write_table(name, "\n".join(text))


if __name__ == "__main__":
    main()
