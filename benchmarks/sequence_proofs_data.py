"""What `sequence_proofs.py` trains on and takes long to draw: chains of arithmetic, ListOps and Pathfinder, on many cores.

No question, expression or picture that is trained on is in the other parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.data.chain_of_thought import EOS, direct, draw_chains, find_task
from tersor.data.long_range import BENCHMARKS, LongRange, LongRangeConfig, Raw, load_long_range

DRAWN = ("listops", "chains", "pathfinder")  # files
SMALL = 40  # times fewer samples with --quick
LENGTH = 6  # operators of the arithmetic
CHAINS, CHAIN_PIECES = 320_000, 16
LISTOPS_LENGTH, LISTOPS, LISTOPS_PIECES = 256, 24_000, 40
PATHFINDER, PATHFINDER_PIECES = 4_000, 40


def draw(folder: Path, *, quick: bool, processes: int) -> None:
    """ListOps, the chains and Pathfinder into `folder`, each as soon as it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, Callable[[tuple[int, int]], Any], int, int, Callable[[list[Any]], Any]]] = [
        ("listops", _listops_piece, LISTOPS, LISTOPS_PIECES, _apart),
        ("chains", _chains_piece, CHAINS, CHAIN_PIECES, _both),
        ("pathfinder", _pathfinder_piece, PATHFINDER, PATHFINDER_PIECES, _apart),
    ]
    with get_context("fork").Pool(processes) as pool:
        for name, piece, count, pieces, join in jobs:
            pieces = 2 if quick else pieces
            each = (count // SMALL if quick else count) // pieces
            each = min(each, 12) if quick else each
            begun = time.perf_counter()
            made = join(pool.map(piece, [(seed, each) for seed in range(pieces)], chunksize=1))
            torch.save(made, folder / f"{name}.partial")
            (folder / f"{name}.partial").rename(folder / f"{name}.pt")
            print(f"{name}: {pieces * each} drawn in {time.perf_counter() - begun:.0f} s", flush=True)


def _chains_piece(piece: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same problems with their steps and without."""
    seed, count = piece
    drawn = draw_chains("arithmetic", count, length=LENGTH, shorter=True, seed=seed)
    return _ids(drawn), _ids([direct("arithmetic", words) for words in drawn])


def _ids(rows: list[list[str]]) -> Tensor:
    known = find_task("arithmetic")
    ids = torch.zeros(len(rows), max(map(len, rows)) + 1, dtype=torch.uint8)
    for row, words in zip(ids, rows, strict=True):
        row[: len(words) + 1] = torch.tensor([*known.ids(words), EOS])
    return ids


def _both(pieces: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    made = {}
    for name, parts in zip(("chain", "direct"), zip(*pieces, strict=True), strict=True):
        longest = max(part.shape[1] for part in parts)
        made[name] = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
    return made


def _listops_piece(piece: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    seed, count = piece
    config = LongRangeConfig(
        length=LISTOPS_LENGTH, train=count, validation=max(2, count // 40), test=max(2, count // 25), seed=seed
    )
    return _tensors("listops", load_long_range("listops", None, config), "tokens", config.length)


def _pathfinder_piece(piece: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    seed, count = piece
    config = LongRangeConfig(train=count, validation=max(2, count // 16), test=max(2, count // 8), seed=seed)
    return _tensors("pathfinder", load_long_range("pathfinder", None, config), "numbers", 0)


def _tensors(task: str, raw: Any, form: str, length: int) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, Raw] = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    made = {
        part: stacked(LongRange(each, BENCHMARKS[task], form=form, name="x", length=length))
        for part, each in parts.items()
    }
    if form == "tokens":
        for each in made.values():
            each["x"] = each["x"].byte()
    return made


def _apart(pieces: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """The pieces' parts in one; a sample that was trained on is in no other part."""
    joined = {
        part: {name: torch.cat([piece[part][name] for piece in pieces]) for name in pieces[0][part]}
        for part in pieces[0]
    }
    known = {bytes(row.numpy().tobytes()) for row in joined["train"]["x"]}
    for part in ("validation", "test"):
        new = torch.tensor([row.numpy().tobytes() not in known for row in joined[part]["x"]])
        joined[part] = {name: value[new] for name, value in joined[part].items()}
    return joined


def stacked(data: LongRange) -> dict[str, Tensor]:
    return dict(torch.utils.data.default_collate([data[index] for index in range(len(data))]))
