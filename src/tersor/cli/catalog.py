"""`tersor catalog`: the taxonomies of five surveys, and what tersor has of each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tersor.advise.catalog import SURVEYS
from tersor.advise.catalog import catalog as read_catalog
from tersor.cli.options import AsJson


def catalog(
    survey: Annotated[str | None, typer.Option(help=f"Only one: {', '.join(SURVEYS)}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which methods and architectures of five surveys of efficient transformers tersor has, and which are missing.

    Example: `tersor catalog --survey inference`.
    """
    found = read_catalog(survey)
    if as_json:
        plain = [
            {**asdict(each), "nodes": [{**asdict(node), "state": node.state} for node in each.nodes]} for each in found
        ]
        typer.echo(json.dumps({"surveys": plain}))
        return
    for number, each in enumerate(found):
        count = Counter(node.state for node in each.nodes)
        states = ", ".join(f"{count[state]} {state}" for state in ("held", "partly", "not held"))
        typer.echo(f"{chr(10) if number else ''}{each.title} ({each.paper}): {states}\n")
        table = Table(box=None, pad_edge=False)
        for column in ("node", "", "by"):
            table.add_column(column, no_wrap=column == "")
        for node in each.nodes:
            by = ", ".join([*node.methods, *node.models, *(name.removeprefix("tersor.") for name in node.features)])
            table.add_row(node.title, node.state, f"{by}; {node.missing}" if node.state == "partly" else by)
        Console().print(table)
