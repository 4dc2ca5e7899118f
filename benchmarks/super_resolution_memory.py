"""Time and peak memory of `tersor predict` on a photo of 4000 x 3000 pixels with a super-resolution network.

    python benchmarks/super_resolution_memory.py [NAME...] [--device cuda] [--tiles N] [--write]

The photo is a picture of scikit-image, repeated; the weights are random, which changes neither time nor memory. The verb runs as
a user runs it, in a process of its own; host is the largest resident memory of that process, with Python, torch and on a GPU the
CUDA libraries, GPU the most that torch had reserved there. Tiles: how many went through the network; where these are not all, the
others were enlarged without it, for the frame is the same then. It is the last ones of full size that go through the network,
when nearly all of the result is in memory. Seconds: on a GPU by the clock, where other processes ran too; on a CPU one tile's
time of the processor, empty where it was not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import command, gpu, kept_numbers, machine, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor.devices import peak_memory
from tersor.tasks import restore, tiles

NAMES = ("rgt_x4", "rgt_s_x4", "dlgsanet_light_x4")
WIDTH, HEIGHT = 4000, 3000
PHOTO = "coffee.png"


def photo(path: Path) -> None:
    import numpy as np
    from PIL import Image
    from vision_training import pictures

    with Image.open(pictures() / PHOTO) as picture:
        piece = np.asarray(picture.convert("RGB"))
    times = (-(-HEIGHT // piece.shape[0]), -(-WIDTH // piece.shape[1]), 1)
    Image.fromarray(np.tile(piece, times)[:HEIGHT, :WIDTH]).save(path)


def child(name: str, device: str, most: int) -> None:
    """One run of the verb; `most` tiles through the network, all where it is 0."""
    from tersor.cli.main import main as tersor_main

    seconds: list[float] = []
    clock = time.perf_counter if device == "cuda" else time.process_time  # of a CPU: its time, for others use it too
    enlarged = restore._enlarged
    sides = [[each.end - each.begin for each in tiles.spans(length)] for length in (HEIGHT, WIDTH)]
    sizes = [(height, width) for height in sides[0] for width in sides[1]]
    full = [n for n, size in enumerate(sizes) if size == (tiles.TILE, tiles.TILE)]
    through = set(full[-most:] if most else range(len(sizes)))
    numbers = iter(range(len(sizes)))
    scale = restore.scale_of(tersor.models.create(name))

    def counted(module: nn.Module, like: Tensor, pixels: Tensor) -> Tensor:
        if next(numbers) not in through:
            return F.interpolate(pixels, scale_factor=scale)
        started = clock()
        made = enlarged(module, like, pixels)
        if made.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        return made

    restore._enlarged = counted
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save(tersor.models.create(name).state_dict(), f"{folder}/untrained.pth")
        photo(Path(folder) / "photo.png")
        started = time.perf_counter()
        asked = ["predict", name, f"{folder}/photo.png", "--checkpoint", f"{folder}/untrained.pth"]
        try:
            tersor_main([*asked, "--out", f"{folder}/large", "--device", device, "--quiet"])
        except SystemExit as ended:
            if ended.code:
                raise
    row: dict[str, Any] = {
        "seconds": time.perf_counter() - started, "tiles": len(seconds), "scale": scale,
        "a tile": sorted(seconds)[len(seconds) // 2],
        "host MiB": peak_memory(torch.device("cpu")) / 2**20,
    }  # fmt: skip
    if device == "cuda":
        row["GPU MiB"] = torch.cuda.max_memory_reserved() / 2**20
    print("ROW " + json.dumps(row), flush=True)


def table(rows: dict[str, dict[str, Any]]) -> str:
    described = (__doc__ or "").strip().split("\n\n")
    lines = ["# Memory of super-resolution on a photo of 4000 x 3000 pixels", "", described[2], ""]
    lines += ["| model | device | tile, pixels | through the network | s a tile | s in all | host MiB | GPU MiB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for key, row in rows.items():
        name, _, device = key.partition(" ")
        on_gpu = f"{row['GPU MiB']:,.0f}" if "GPU MiB" in row else ""
        whole = f"{row['seconds']:.0f}" if row["tiles"] == row["of"] else ""
        a_tile = f"{row['a tile']:.3g}" if "a tile" in row else ""
        lines += [
            f"| `{name}` | {device} | {row['side']} | {row['tiles']} of {row['of']} | {a_tile} | {whole} "
            f"| {row['host MiB']:,.0f} | {on_gpu} |"
        ]
    return "\n".join([*lines, "", *dict.fromkeys(f"- {row['where']}. `{row['command']}`" for row in rows.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiles", type=int, default=0, help="that go through the network; all without it")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.device, given.tiles)
        return
    count = len(tiles.spans(WIDTH)) * len(tiles.spans(HEIGHT))
    for name in given.names or NAMES:
        how = ["--child", name, "--device", given.device, "--tiles", str(given.tiles)]
        ran = subprocess.run([sys.executable, __file__, *how], stdout=subprocess.PIPE, text=True, check=False)
        said = next((line for line in ran.stdout.splitlines() if line.startswith("ROW ")), None)
        if said is None:
            print(f"{name} FAILED with status {ran.returncode}", flush=True)
            continue
        row = json.loads(said[4:]) | {"side": tiles.TILE, "of": count, "command": command()}
        row["where"] = gpu() if given.device == "cuda" else machine()
        print(name, json.dumps(row), flush=True)
        if given.write:
            rows = kept_numbers("super_resolution_memory") | {f"{name} {given.device}": row}
            write_numbers("super_resolution_memory", rows)
            write_table("super_resolution_memory", table(rows))


if __name__ == "__main__":
    main()
