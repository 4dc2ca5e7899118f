"""`tersor models [PATTERN]`: the architectures that tersor builds."""

from __future__ import annotations

import difflib
from itertools import groupby
from typing import Annotated

import typer

from tersor.cli.options import AsJson, print_json
from tersor.errors import TersorError
from tersor.models import ModelInfo, registry


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(help='A shell pattern over names, families or tasks: "shvit*", "vision/*", "forecast".'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the architectures that tersor builds and trains. It also loads and compresses them.

    Without a pattern, one line an architecture; with one, every published variant that matches. `tersor show NAME` tells
    what an architecture is and how it is used.

    Examples: `tersor models`, `tersor models "vision/*"`, `tersor models forecast`.
    """
    found = registry.list_models() if pattern is None else registry.list_models(pattern)
    if not found:
        patterns = {
            name for info in registry.list_models() for name in (info.name, info.system, info.family, info.task)
        }
        meant = difflib.get_close_matches(pattern or "", patterns, n=1)
        hint = f"did you mean {meant[0]}? " if meant else ""
        raise TersorError(f"no model matches {pattern!r}; {hint}`tersor models` without a pattern lists all")
    if as_json:
        print_json([_facts(info) for info in found])
        return
    rows = _systems(found) if pattern is None else [(i.name, i.task, f"{i.parameters:,}", i.paper) for i in found]
    families = [info.family for info in found]
    if pattern is None:
        families = [next(info.family for info in found if info.system == row[0]) for row in rows]
    alike = families if pattern is None else [(info.family, info.system) for info in found]
    shown = ""
    for (family, _), group in groupby(zip(families, alike, rows, strict=True), key=lambda each: each[:2]):
        members = [row for *_, row in group]
        widths = [max(len(row[column]) for row in members) for column in range(3)]  # of those alike: 80 columns suffice
        if family != shown:
            typer.echo(family)
        shown = family
        for name, task, size, paper in members:
            typer.echo(f"  {name:{widths[0]}}  {task:{widths[1]}}  {size:>{widths[2]}}  {_short(paper)}".rstrip())


def _systems(found: list[ModelInfo]) -> list[tuple[str, str, str, str]]:
    """One row an architecture: its name, task, range of sizes and paper."""
    rows = []
    for system, group in groupby(found, key=lambda info: info.system):
        variants = list(group)
        sizes = sorted(
            {_rounded(info.parameters): info.parameters for info in variants}.items(), key=lambda each: each[1]
        )
        told = sizes[0][0] if len(sizes) == 1 else f"{sizes[0][0]} to {sizes[-1][0]}"
        rows.append((system, variants[0].task, told, variants[0].paper))
    return rows


def _rounded(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def _short(paper: str) -> str:
    """The first reference, so that a row keeps within 80 columns."""
    return paper.partition(",")[0]


def _facts(info: ModelInfo) -> dict[str, object]:
    names = ("name", "system", "family", "task", "input", "parameters", "paper")
    return {name: getattr(info, name) for name in names}
