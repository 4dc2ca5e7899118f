from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.data.life import decode, encode, encode_prompt, make_life, next_generation, random_boards, simulate
from tersor.errors import TersorError


@pytest.fixture(scope="module")
def boards() -> Tensor:
    return random_boards(16, rows=8, columns=8, density="high", seed=3)


def test_the_rule_commutes_with_shifts_and_the_symmetries_of_the_square(boards: Tensor) -> None:
    after = next_generation(boards)
    for change in (
        lambda board: board.roll((3, -2), (-2, -1)),
        lambda board: board.transpose(-2, -1),
        lambda board: board.rot90(1, (-2, -1)),
        lambda board: board.flip(-1),
    ):
        assert torch.equal(next_generation(change(boards)), change(after))


def test_a_glider_moves_one_cell_down_and_right_in_four_generations() -> None:
    board = torch.zeros(8, 8, dtype=torch.long)
    for cell in ((0, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        board[cell] = 1
    assert torch.equal(simulate(board, 4)[-1], board.roll((1, 1), (0, 1)))


def test_without_wrapping_what_lies_beyond_the_edge_is_empty() -> None:
    board = torch.zeros(5, 5, dtype=torch.long)
    board[0, 1:4] = 1  # a blinker on the edge: its upper cell would be on the other side
    assert next_generation(board)[-1, 2] == 1
    assert next_generation(board, wrap=False).nonzero().tolist() == [[0, 2], [1, 2]]


def test_a_sample_is_the_published_text(boards: Tensor) -> None:
    ids = make_life(3, rows=2, columns=2, density=1.0)
    assert bytes(ids[0].tolist()) == b"@PredictNextState<1111> [0000]$"  # every cell has eight neighbours on a torus
    assert make_life(1).shape == (1, 2071)
    sample, prompt = encode(boards, next_generation(boards)), encode_prompt(boards)
    assert torch.equal(sample[:, : prompt.shape[1]], prompt)
    assert torch.equal(decode(sample[0, prompt.shape[1] :], 8, 8), next_generation(boards[0]))


def test_broad_boards_have_every_share_of_live_cells() -> None:
    share = random_boards(101, rows=32, columns=32).double().mean((1, 2))
    assert (share - torch.linspace(0, 1, 101)).abs().max() < 0.08


@pytest.mark.parametrize("text", [b" [01]$", b" [012?]$", b"0101"])
def test_refuses_an_answer_that_is_no_board(text: bytes) -> None:
    with pytest.raises(TersorError, match="2 x 2"):
        decode(torch.tensor(list(text)), 2, 2)


def test_refuses_an_unknown_density() -> None:
    with pytest.raises(TersorError, match="'low'"):
        random_boards(2, rows=2, columns=2, density="low")
