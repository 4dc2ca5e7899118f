"""`tersor show NAME`: what an architecture is, how it is used, which variants were published."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from tersor import models


def show(
    name: Annotated[str, typer.Argument(help="An architecture or one of its variants: `tersor models` lists them.")],
) -> None:
    """Tell what an architecture is: its paper, use, formula, origin, what is proven of it, and its variants.

    Example: `tersor show shvit`.
    """
    info = models.find(name)
    spec = importlib.util.find_spec(info.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    typer.echo(ast.get_docstring(ast.parse(source)))
    variants = [each for each in models.list() if each.system == info.system]
    typer.echo(f"\nTask: {info.task}. Input: {info.input}. Paper: {info.paper}.\n\nVariants:")
    width = max(len(each.name) for each in variants)
    for each in variants:
        typer.echo(f"  {each.name:{width}}  {each.parameters:>13,} parameters")
