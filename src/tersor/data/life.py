"""Conway's Game of Life on a torus, and its boards as text (LifeGPT, arXiv 2409.12182).

A live cell stays with two or three live neighbours of its eight, an empty one comes alive with three. A sample is

    @PredictNextState<0100...> [0011...]$

with the cells row by row: 2 rows columns + 23 bytes, which are the token ids.

    ids = make_life(10_000, rows=8, columns=8, seed=0)                 # (10000, 151)
    later = simulate(board, 10)                                        # (10, rows, columns)

`density="broad"` draws sample i of n with the share i / (n - 1) of live cells, so that all shares from 0 to 1 are seen,
in order; "high" draws every cell with 1/2; a number is the share itself. The published generator draws other boards
from a seed; the rule and the text are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError

PROMPT_START, PROMPT_END, ANSWER_START, ANSWER_END = "@PredictNextState<", ">", " [", "]$"


def next_generation(board: Tensor, *, wrap: bool = True) -> Tensor:
    """board (..., rows, columns) of 0 and 1 -> the next one. Without `wrap`, all beyond the edge is empty."""
    around = board if wrap else F.pad(board, (1, 1, 1, 1))
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column]
    neighbours = torch.stack([around.roll(shift, (-2, -1)) for shift in shifts]).sum(0)
    if not wrap:
        neighbours = neighbours[..., 1:-1, 1:-1]
    return ((neighbours == 3) | (neighbours == 2) & (board == 1)).to(board.dtype)


def simulate(board: Tensor, generations: int, *, wrap: bool = True) -> Tensor:
    """The generations after `board`: (generations, ..., rows, columns)."""
    later = []
    for _ in range(generations):
        board = next_generation(board, wrap=wrap)
        later.append(board)
    return torch.stack(later) if later else board.new_empty(0, *board.shape)


def make_life(
    count: int, *, rows: int = 32, columns: int = 32, density: str | float = "broad", jump: int = 1, seed: int = 0
) -> Tensor:
    """Samples as bytes (count, 2 rows columns + 23), each a random board and the one `jump` generations later."""
    boards = random_boards(count, rows=rows, columns=columns, density=density, seed=seed)
    return encode(boards, simulate(boards, jump)[-1])


def random_boards(count: int, *, rows: int, columns: int, density: str | float = "broad", seed: int = 0) -> Tensor:
    """(count, rows, columns) of 0 and 1."""
    if min(count, rows, columns) < 1:
        raise TersorError(f"there are no {count} boards of {rows} x {columns} cells")
    if density == "broad":
        shares = torch.linspace(0, 1, count)
    else:
        share = 0.5 if density == "high" else density
        if isinstance(share, str) or not 0 <= share <= 1:
            raise TersorError(f"density is 'broad', 'high' or a share from 0 to 1, not {density!r}")
        shares = torch.full((count,), float(share))
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, rows, columns, generator=generator) < shares[:, None, None]).long()


def encode(board: Tensor, after: Tensor) -> Tensor:
    """Two boards (..., rows, columns) as one sample's bytes (..., 2 rows columns + 23)."""
    cells = [each.flatten(-2) + ord("0") for each in (board, after)]
    return _joined(PROMPT_START, cells[0], PROMPT_END + ANSWER_START, cells[1], ANSWER_END)


def encode_prompt(board: Tensor) -> Tensor:
    """A board (..., rows, columns) as the bytes up to and including '>'; the answer is for the model to write."""
    return _joined(PROMPT_START, board.flatten(-2) + ord("0"), PROMPT_END)


def decode(answer: Tensor, rows: int, columns: int) -> Tensor:
    """What follows a prompt, as bytes (n,) -> the board between [ and ]; anything but a whole board is refused."""
    text = bytes(answer.tolist()).decode("latin1")
    cells = text.partition("[")[2].partition("]")[0]
    if len(cells) != rows * columns or set(cells) - {"0", "1"}:
        raise TersorError(f"{text!r} holds no board of {rows} x {columns} cells between [ and ]")
    return torch.tensor([int(cell) for cell in cells]).reshape(rows, columns)


def _joined(*parts: str | Tensor) -> Tensor:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    leading = tensors[0].shape[:-1]
    pieces = [
        part if isinstance(part, Tensor) else tensors[0].new_tensor(list(part.encode())).expand(*leading, -1)
        for part in parts
    ]
    return torch.cat(pieces, -1)
