from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.data.life import encode, next_generation, random_boards, simulate
from tersor.evaluate.life import cell_accuracy, play


class Perfect:
    """Writes the next board by rule, and after `good` of them something else."""

    def __init__(self, good: int) -> None:
        self.left = good

    def prefill(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        board = ids[:, 18:-1].reshape(-1, 6, 6) - ord("0")
        self.left -= 1
        text = encode(board, next_generation(board))[:, ids.shape[1] :] if self.left >= 0 else ids.flip(1)
        return self._logits(text[:, :1]), (text, 1)

    def step(self, token: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
        text, place = state
        assert torch.equal(token, text[:, place - 1])
        return self._logits(text[:, place : place + 1])[:, 0], (text, place + 1)

    def _logits(self, ids: Tensor) -> Tensor:
        return 20.0 * F.one_hot(ids, 256)


def test_a_perfect_model_plays_by_the_rule_at_any_temperature() -> None:
    board = random_boards(1, rows=6, columns=6, density="high", seed=1)[0]
    for temperature in (0.0, 0.5):
        boards, whole = play(Perfect(5), board, generations=5, temperature=temperature)
        assert whole
        assert torch.equal(boards, simulate(board, 5))


def test_a_game_ends_where_the_model_writes_no_board() -> None:
    board = random_boards(1, rows=6, columns=6, density="high", seed=1)[0]
    boards, whole = play(Perfect(2), board, generations=5)
    assert not whole
    assert torch.equal(boards, simulate(board, 2))


def test_accuracy_counts_cells() -> None:
    boards = random_boards(4, rows=6, columns=6, density="high", seed=2)
    assert cell_accuracy(Perfect(1), boards) == 1.0
    assert cell_accuracy(Perfect(0), boards) < 0.8
