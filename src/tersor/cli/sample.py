"""`tersor sample`: a shape or a video out of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import AsJson, Device, print_json, refuse_to_replace, spare
from tersor.cli.progress import progress_bar
from tersor.tasks.sample import sample as make
from tersor.tasks.task import Order


def sample(
    model: Annotated[
        str, typer.Argument(help="A directory with a model, or with the folders transformer and vae of a pipeline.")
    ],
    out: Annotated[
        Path, typer.Option(help="The file to write: .glb, .obj, .ply, .stl (shapes), .gif, .png, .npy (videos).")
    ],
    prompt: Annotated[str | None, typer.Option(help="What to make: for g3pt, the number of a class.")] = None,
    condition: Annotated[
        Path | None,
        typer.Option(help="A file to go by: a picture of the shape, the first frames of the video, or .npy."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to the result; 50 where not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same one gives the same bytes.")] = 0,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly to follow the condition; 7 for triposg, 1 for g3pt where not given."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Cells a side of the grid that a shape is read from; 128 where not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out where it exists.")] = False,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Make a shape or a video out of noise. Which it is follows from the model's task.

    Examples: `tersor sample triposg-folder --condition chair.png --out chair.glb`,
    `tersor sample my-g3pt --prompt 2 --seed 7 --out shape.obj`, `tersor sample my-vdt --condition start.gif --out film.gif`.
    """
    if condition is not None:
        spare(condition, "--out", out)
    refuse_to_replace("--out", out, overwrite=overwrite)
    order = Order(out, seed, prompt, condition, steps, guidance, resolution)
    with progress_bar(quiet=as_json) as progress:
        made = make(model, order, device=device, progress=progress)
    if as_json:
        print_json(made.as_dict())
    else:
        typer.echo(made.line())
