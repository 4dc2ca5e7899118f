"""`tersor models [PATTERN]`: the architectures that tersor builds."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import tersor.models
from tersor.errors import TersorError


def models(
    pattern: Annotated[str, typer.Argument(help='A shell pattern over names or families: "shvit*", "vision/*".')] = "*",
) -> None:
    """List the architectures that tersor can build, train, load and compress."""
    found = tersor.models.list(pattern)
    if not found:
        raise TersorError(f"no model matches {pattern!r}; `tersor models` without a pattern lists all")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("family")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("input")
    table.add_column("paper")
    for info in found:
        table.add_row(info.name, info.family, f"{info.parameters:,}", info.input, info.paper)
    Console().print(table)
