"""`tersor predict`: what a model says of files."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import AsJson, Device, print_json
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError
from tersor.tasks.predict import grouped, input_files, open_predictor, predictions, results_of

SKIPPED = 1  # the exit status where a file could not be read


def predict(
    model: Annotated[
        str, typer.Argument(help="A directory or hub name, or with --checkpoint an architecture of `tersor models`.")
    ],
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or patterns such as 'photos/*.jpg'.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The official weights of the architecture: .pth, .pt, .bin or .safetensors.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results that are files.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --out: replace results that are there already.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="What an enlarged picture should be, for PSNR and SSIM: a file, or a folder with the same names."
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one row a file.")] = False,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Predict for files of your own, by the model's task. Told are the five likeliest classes of a picture, point cloud or
    mesh, what happens when in a video, the picture enlarged, the classes of its pixels, the shape that several pictures
    show, or what the nodes of a graph are.

    A file that cannot be read is named on standard error and skipped; the exit status is then 1.

    Examples: `tersor predict demo-vit photo.png`, `tersor predict my-run photos/ --csv`,
    `tersor predict rgt_s_x4 photo.jpg --checkpoint RGT_S_x4.pth --out large`.
    """
    if as_csv and as_json:
        raise TersorError("--csv and --json exclude each other")
    if overwrite and out is None:
        raise TersorError("--overwrite goes with --out, the folder of the results")
    predictor = open_predictor(model, checkpoint=checkpoint, device=device, out=out, reference=reference)
    task = predictor.task
    files = grouped(input_files(inputs, task.suffixes, task.marker, task.inside), task)
    if not overwrite and (there := results_of(predictor, files)):
        raise TersorError(f"{there[0]} exists; give another --out, or --overwrite to replace it")
    skipped, told = 0, []
    table = csv.writer(sys.stdout, lineterminator="\n")
    with progress_bar() as progress:
        for number, (path, found) in enumerate(predictions(predictor, files, progress), 1):
            if len(files) > 1:
                progress(path.name, number, len(files))
            if isinstance(found, TersorError):
                skipped += 1
                typer.echo(f"tersor: {found}", err=True)
            elif as_json:
                told.append(found.as_dict())
            elif as_csv:
                table.writerow(_row(found.as_dict()))
            else:
                typer.echo(found.line())
    if as_json:
        print_json(told)
    if skipped:
        typer.echo(f"tersor: {skipped} of {len(files)} files skipped", err=True)
        raise typer.Exit(SKIPPED)


def _row(values: dict[str, object]) -> list[object]:
    """The values one after another; lists by their entries."""
    return [each for value in values.values() for each in (value if isinstance(value, list) else [value])]
