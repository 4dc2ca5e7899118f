"""`tersor doctor`: what this machine offers, which kernels run on it and how fast, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from tersor.cli.options import AsJson
from tersor.evaluate.machine import EXTRAS, Machine, advice, examine


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show what tersor finds on this machine, the kernels that run here and their speed, and what is missing.

    The first time, this compiles the kernel, which takes a while.
    """
    machine = examine()
    said = advice(machine)
    if as_json:
        typer.echo(json.dumps({**asdict(machine), "advice": said}))
        return
    console = Console(highlight=False, markup=False)
    for name, value in _facts(machine):
        console.print(f"{name:<11} {value}", soft_wrap=True)
    console.print(
        f"\nA linear layer of 4096 x 4096, symmetric, groups of 128, in {machine.dtype} on {machine.device}; "
        "`1 row` is a token being generated, `64 rows` a prompt.",
        soft_wrap=True,
    )
    console.print(_table(machine))
    for reason in dict.fromkeys(each.why_not for each in machine.kernels if each.why_not is not None):
        bits = ", ".join(str(each.bits) for each in machine.kernels if each.why_not == reason)
        console.print(f"No compiled kernel for {bits} bits: {reason}", soft_wrap=True)
    console.print()
    for sentence in said:
        console.print(f"- {sentence}.", soft_wrap=True)


def _facts(machine: Machine) -> list[tuple[str, str]]:
    has = [name for name, yes in machine.features.items() if yes]
    lacks = [name for name, yes in machine.features.items() if not yes]
    memory = "unknown" if machine.memory is None else f"{machine.memory / 2**30:.1f} GiB"
    if machine.memory_available is not None:
        memory += f", {machine.memory_available / 2**30:.1f} GiB available"
    gpus = [
        f"{each.name}, {each.memory / 2**30:.0f} GiB, capability {each.capability}, "
        f"{'packed kernel' if each.kernel else 'no packed kernel'}"
        for each in machine.gpus
    ]
    extras = [
        f"{extra} {version}" if version else f"{extra} not installed ({EXTRAS[extra][1]})"
        for extra, version in machine.extras.items()
    ]
    return [
        ("system", machine.system),
        (
            "processor",
            f"{machine.processor}: {', '.join(has) or 'none of the features asked for'}; not {', '.join(lacks)}",
        ),
        ("threads", f"{machine.threads} of {machine.cores} cores"),
        ("memory", memory),
        ("GPU", "; ".join(gpus) or "none"),
        ("compiler", machine.compiler or f"none: {machine.compiler_missing}"),
        ("kernels", f"{machine.kernel_cache}{'' if machine.kernel_cache_writable else ' (not writable)'}"),
        ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in machine.versions.items())),
        ("extras", "\n            ".join(extras)),
    ]


def _table(machine: Machine) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("bits", "implementation", *(f"{rows} rows" if rows > 1 else "1 row" for rows in machine.dense)):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    table.add_row("", "F.linear", *(f"{ms:.2f} ms" for ms in machine.dense.values()))
    for each in machine.kernels:
        cells = [f"{each.milliseconds[rows]:.2f} ms, {_times(each.speedup[rows])}" for rows in machine.dense]
        table.add_row(str(each.bits), each.implementation, *cells)
    return table


def _times(ratio: float) -> str:
    return f"{ratio:.1f} x" if ratio >= 1 else f"{ratio:.2g} x"
