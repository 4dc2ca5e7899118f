"""`tersor doctor`: what this machine offers, which kernels run on it and how fast, and what is missing."""

from __future__ import annotations

from dataclasses import asdict

import typer

from tersor.cli.options import AsJson, print_json
from tersor.cli.table import print_table, wrapped
from tersor.evaluate.machine import EXTRAS, Machine, advice, examine


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show what tersor finds on this machine, and what is missing. Also which kernels run here, and their speed.

    The first time, this compiles the kernel, which takes a while.

    Example: `tersor doctor --json`.
    """
    machine = examine()
    said = advice(machine)
    if as_json:
        print_json({**asdict(machine), "advice": said})
        return
    for name, value in _facts(machine):
        for line in wrapped(f"{name:<11} {value}".split("\n"), indent=12):
            typer.echo(line)
    typer.echo(
        f"\nA linear layer of 4096 x 4096, symmetric, groups of 128, in {machine.dtype} on {machine.device}; "
        "`1 row` is a token being generated, `64 rows` a prompt."
    )
    _print_kernels(machine)
    for reason in dict.fromkeys(each.why_not for each in machine.kernels if each.why_not is not None):
        bits = ", ".join(str(each.bits) for each in machine.kernels if each.why_not == reason)
        typer.echo(f"No compiled kernel for {bits} bits: {reason}")
    typer.echo()
    for sentence in said:
        typer.echo(f"- {sentence}.")


def _facts(machine: Machine) -> list[tuple[str, str]]:
    has = [name for name, yes in machine.features.items() if yes]
    lacks = [name for name, yes in machine.features.items() if not yes]
    memory = "unknown" if machine.memory is None else f"{machine.memory / 2**30:.1f} GiB"
    if machine.memory_available is not None:
        memory += f", {machine.memory_available / 2**30:.1f} GiB available"
    gpus = [
        f"{each.name}, {each.memory / 2**30:.0f} GiB, capability {each.capability}, "
        f"{f'packed kernel ({each.kernel})' if each.kernel else 'no packed kernel'}"
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


def _print_kernels(machine: Machine) -> None:
    head = ("bits", "implementation", *(f"{rows} rows" if rows > 1 else "1 row" for rows in machine.dense))
    rows = [("", "F.linear", *(f"{ms:.2f} ms" for ms in machine.dense.values()))]
    for each in machine.kernels:
        cells = [f"{each.milliseconds[n]:.2f} ms, {_times(each.speedup[n])}" for n in machine.dense]
        rows.append((str(each.bits), each.implementation, *cells))
    print_table(head, rows, left=(1,))


def _times(ratio: float) -> str:
    return f"{ratio:.1f} x" if ratio >= 1 else f"{ratio:.2g} x"
