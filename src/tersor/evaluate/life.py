"""How well a language model plays the Game of Life (tersor.data.life), one board after another.

    boards, whole = play(model, board, generations=20)      # fed its own answers, as far as they are boards
    accuracy = cell_accuracy(model, boards)                 # share of right cells in the next generation

The model has `prefill` and `step`. At temperature 0 the likeliest byte is written, else one is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.data.life import ANSWER_END, ANSWER_START, decode, encode_prompt, next_generation
from tersor.errors import TersorError


@torch.no_grad()
def answer(model: Any, boards: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """boards (B, rows, columns) -> what the model writes after each prompt, bytes (B, rows columns + 4)."""
    if temperature < 0:
        raise TersorError(f"temperature must not be below 0, it is {temperature}")
    count = boards[0].numel() + len(ANSWER_START + ANSWER_END)
    logits, state = model.prefill(encode_prompt(boards))
    logits, written = logits[:, -1], []
    for place in range(count):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        written.append(token)
        if place < count - 1:
            logits, state = model.step(token, state)
    return torch.stack(written, 1)


def cell_accuracy(
    model: Any, boards: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
) -> float:
    """The share of cells that the model gets right, by position from the byte after the answer's start on. A byte that is no
    cell is wrong."""
    written = answer(model, boards, temperature=temperature, generator=generator)
    cells = written[:, len(ANSWER_START) : -len(ANSWER_END)]
    right = next_generation(boards).flatten(1) + ord("0")
    return float((cells == right).double().mean())


def play(
    model: Any,
    board: Tensor,
    *,
    generations: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, bool]:
    """board (rows, columns) -> the generations that the model makes of it, each from its own last, (n, rows, columns),
    and whether all were boards: n is less than asked for where the model wrote something else."""
    made: list[Tensor] = []
    for _ in range(generations):
        text = answer(model, board[None], temperature=temperature, generator=generator)[0]
        try:
            board = decode(text.cpu(), *board.shape).to(board)
        except TersorError:
            break
        made.append(board)
    return torch.stack(made) if made else board.new_empty(0, *board.shape), len(made) == generations
