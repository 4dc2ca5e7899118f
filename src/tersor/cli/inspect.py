"""`tersor inspect`: what is in a checkpoint, without loading it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from tersor.cli.options import AsJson, Variant, opened_as, print_json
from tersor.cli.table import print_table, wrapped
from tersor.evaluate.inspection import inspect_checkpoint


def inspect(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's layers, formats and bits a weight. It reads the headers alone.

    Example: `tersor inspect demo-4bit`.
    """
    found = inspect_checkpoint(opened_as(model, variant))
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(
        f"{found.architecture}: {found.parameters:,} parameters, {found.size / 1e6:.1f} MB in {found.files} file(s), "
        f"{found.format}"
    )
    for method in found.methods:
        options = ", ".join(f"{name} {_word(value)}" for name, value in method.items() if name != "name")
        _echo(f"made by {method.get('name')}: {options}")
    rows = []
    for group in found.blocks:
        block = f"{group.first} ... ({group.count})" if group.count > 1 else group.first
        columns = zip(group.linears, group.shapes, group.bits, group.a_bits, strict=True)
        for name, (outputs, inputs), bits, a_bits in columns:
            rounded = "" if a_bits is None else str(a_bits)
            rows.append((block, name, f"{outputs} x {inputs}", f"{bits:.3f}", rounded))
            block = ""  # once is enough
    head = ("blocks", "layers in each", "shapes", "bits a weight", "of the input")
    most = 5 if any(row[4] for row in rows) else 4
    print_table(head[:most], [row[:most] for row in rows], left=(0, 1))
    if found.outside:
        parts = (name if bits is None else f"{name} ({bits:.3f} bits)" for name, bits in found.outside.items())
        _echo(f"outside the blocks: {', '.join(parts)}")
    if found.unknown:
        typer.echo(f"tensors that the architecture has no place for: {', '.join(found.unknown[:8])}")


def _echo(line: str) -> None:
    for each in wrapped([line]):
        typer.echo(each)


def _word(value: Any) -> str:
    return "yes" if value is True else "no" if value is False else "not set" if value is None else str(value)
