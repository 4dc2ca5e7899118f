"""`tersor catalog`: the taxonomies of five surveys, and what tersor has of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from tersor.advise.catalog import SURVEYS
from tersor.advise.catalog import catalog as read_catalog
from tersor.cli.options import AsJson, print_json
from tersor.cli.table import print_table, wrapped


def catalog(
    survey: Annotated[str | None, typer.Option(help=f"Only one: {', '.join(SURVEYS)}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what tersor has of five surveys, and what is missing. The surveys cover methods and architectures of efficient
    transformers.

    Example: `tersor catalog --survey inference`.
    """
    found = read_catalog(survey)
    if as_json:
        plain = [
            {**asdict(each), "nodes": [{**asdict(node), "state": node.state} for node in each.nodes]} for each in found
        ]
        print_json({"surveys": plain})
        return
    for number, each in enumerate(found):
        count = Counter(node.state for node in each.nodes)
        states = ", ".join(f"{count[state]} {state}" for state in ("held", "partly", "not held"))
        for line in ([""] if number else []) + wrapped([f"{each.title} ({each.paper}): {states}"]) + [""]:
            typer.echo(line)
        rows = []
        for node in each.nodes:
            names = [*node.methods, *node.models, *(name.removeprefix("tersor.") for name in node.features)]
            by = ", ".join(dict.fromkeys(names))
            rows.append((node.title, node.state, f"{by}; {node.missing}" if node.state == "partly" else by))
        print_table(("node", "", "by"), rows, left=(0, 1, 2))
