"""`tersor show NAME`: what an architecture is, how it is used, which variants were published."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from tersor import models
from tersor.cli.options import AsJson, print_json
from tersor.cli.table import wrapped


def show(
    name: Annotated[str, typer.Argument(help="An architecture or one of its variants: `tersor models` lists them.")],
    as_json: AsJson = False,
) -> None:
    """Tell what an architecture is, and what is proven of it. Its paper, use, formula, origin and variants are there, too.

    Example: `tersor show shvit`.
    """
    info = models.find(name)
    spec = importlib.util.find_spec(info.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(source)) or ""
    variants = [each for each in models.list() if each.system == info.system]
    if as_json:
        facts = {name: getattr(info, name) for name in ("system", "family", "task", "input", "paper")}
        sizes = {each.name: each.parameters for each in variants}
        print_json({**facts, "description": said, "parameters": sizes})
        return
    for paragraph in said.split("\n\n"):
        for line in _lines(paragraph):
            typer.echo(line)
        typer.echo()
    typer.echo(f"Task: {info.task}. Input: {info.input}. Paper: {info.paper}.\n\nVariants:")
    width = max(len(each.name) for each in variants)
    for each in variants:
        typer.echo(f"  {each.name:{width}}  {each.parameters:>13,} parameters")


def _lines(paragraph: str) -> list[str]:
    """Prose and points anew in the width of the terminal; formulae and code as they are written."""
    if re.search("^    ", paragraph, re.MULTILINE):
        return paragraph.splitlines()
    points = re.split(r"\n(?=\* )", paragraph)
    return [line for point in points for line in wrapped([" ".join(point.split())], indent=2 * point.startswith("* "))]
