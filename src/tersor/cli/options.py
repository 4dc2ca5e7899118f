"""Options that several commands have, with their help."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tersor.untrusted import check_number

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
SampleSeed = Annotated[int, typer.Option(help="Seed of the choice of samples.")]
Include = Annotated[list[str] | None, typer.Option(help="Only layers that match, such as `*.mlp.*`.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not layers that match.")]
Variant = Annotated[
    str | None,
    typer.Option("--as", help="Which model of `tersor models` a published weight file is, such as shvit_s1."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A directory or hub name of a tokenizer, or `bytes`, in place of the model's own."),
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token every time.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens only; 0: from all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens that have this probability together.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens with this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Makes tokens that were there already less likely; 1 does nothing.")
]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Verb(TyperCommand):
    """A command whose whole numbers fit in 64 bits."""

    def invoke(self, ctx: Any) -> Any:
        for name, value in ctx.params.items():
            check_number(f"--{name.replace('_', '-')}", value)
        return super().invoke(ctx)


def opened_as(model: str, variant: str | None) -> str:
    """The model's name, or where a published file lies in our layout."""
    if variant is None:
        return model
    from tersor.checkpoint.published import checkpoint_as

    return str(checkpoint_as(model, variant))
