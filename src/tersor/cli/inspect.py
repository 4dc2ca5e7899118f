"""`tersor inspect`: what is in a checkpoint, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tersor.cli.options import AsJson, Variant, opened_as
from tersor.evaluate.inspection import inspect_checkpoint


def inspect(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's blocks, linear layers, formats and bits per weight; reads no weights."""
    found = inspect_checkpoint(opened_as(model, variant))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    console = Console()
    console.print(
        f"{found.architecture}: {found.parameters:,} parameters, {found.bytes / 1e6:.1f} MB in {found.files} file(s), "
        f"{found.format}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("blocks", "layers in each", "shapes", "bits a weight"):
        table.add_column(column)
    for group in found.blocks:
        table.add_row(
            f"{group.first} ... ({group.count})" if group.count > 1 else group.first,
            "\n".join(group.linears),
            "\n".join(f"{o} x {i}" for o, i in group.shapes),
            "\n".join(f"{b:.3f}" for b in group.bits),
        )
    console.print(table)
    if found.outside:
        parts = (name if bits is None else f"{name} ({bits:.3f} bits)" for name, bits in found.outside.items())
        console.print(f"outside the blocks: {', '.join(parts)}")
    if found.unknown:
        console.print(f"tensors that the architecture has no place for: {', '.join(found.unknown[:8])}")
