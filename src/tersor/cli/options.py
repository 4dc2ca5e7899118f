"""Options that several commands have, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
SampleSeed = Annotated[int, typer.Option(help="Seed of the choice of samples.")]
Include = Annotated[list[str] | None, typer.Option(help="Only layers that match, such as `*.mlp.*`.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not layers that match.")]
Variant = Annotated[
    str | None,
    typer.Option("--as", help="Which model of `tersor models` a published weight file is, such as shvit_s1."),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin) too.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def opened_as(model: str, variant: str | None) -> str:
    """The model's name, or where a published file lies in our layout."""
    if variant is None:
        return model
    from tersor.checkpoint.published import checkpoint_as

    return str(checkpoint_as(model, variant))
