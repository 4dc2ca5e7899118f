"""LongVQ: attention over quantised keys is exact and streams; its codebook follows the keys."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.errors import TersorError
from tersor.layers.vq_attention import Codebook, causal_vq_attention, nearest, vq_attention
from tersor.train.objectives import answering

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "d_z": 8, "codes": 12, "block": 4, "d_state": 8}


def drawn(L: int, *, codes: int = 12, d: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, quantised k, v, index and codebook, in float64."""
    torch.manual_seed(L)
    q, k = torch.randn(2, 2, L, d, dtype=torch.float64)
    v, codebook = torch.randn(2, L, 5, dtype=torch.float64), torch.randn(codes, d, dtype=torch.float64)
    index = nearest(k, codebook)
    return q, codebook[index], v, index, codebook


def full_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2) + bias).softmax(-1) @ v


def near_bias(L: int, block: int, bias: Tensor, *, causal: bool) -> Tensor:
    """(L, L): the bias of near positions by distance, 0 for far ones, -inf for the future."""
    t = torch.arange(L)
    distance, blocks = t[:, None] - t, t[:, None] // block - t // block
    if causal:
        added = torch.where(blocks <= 1, bias[distance.clamp(0, 2 * block - 1)], 0.0)
        return added.masked_fill(distance < 0, float("-inf"))
    offset = (distance + 2 * block - 1).clamp(0, 4 * block - 2)
    return torch.where(blocks.abs() <= 1, bias[offset], 0.0)


@pytest.mark.parametrize("L", [1, 4, 7, 23, 32])
@pytest.mark.parametrize("block", [1, 4])
def test_causal_attention_is_softmax_attention_over_codewords(L: int, block: int) -> None:
    q, k, v, index, codebook = drawn(L)
    bias = torch.randn(2 * block, dtype=torch.float64)
    y, _ = causal_vq_attention(q, k, v, index, codebook, bias, block=block)
    expected = full_attention(q, k, v, near_bias(L, block, bias, causal=True))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("L", [1, 5, 24, 31])
@pytest.mark.parametrize("block", [1, 4])
def test_attention_both_ways_is_softmax_attention_with_padding_hidden(L: int, block: int) -> None:
    q, k, v, index, codebook = drawn(L)
    bias = torch.randn(4 * block - 1, dtype=torch.float64)
    valid = torch.arange(L) < torch.tensor([[L], [max(1, L // 3)]])
    y = vq_attention(q, k, v, index, codebook, bias, block=block, valid=valid)
    added = near_bias(L, block, bias, causal=False)[None].masked_fill(~valid[:, None], float("-inf"))
    torch.testing.assert_close(y, full_attention(q, k, v, added), rtol=0, atol=1e-10)


def test_a_codebook_that_holds_the_keys_gives_full_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 8)
    codebook = torch.cat((k[0], torch.randn(5, 8)))
    index = nearest(k, codebook)
    assert index.tolist() == [list(range(20))]
    y, _ = causal_vq_attention(q, codebook[index], v, index, codebook, torch.zeros(8), block=4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [4, 8, 1, 3, 14], [7, 23]])
def test_pieces_and_steps_equal_the_whole(pieces: list[int]) -> None:
    torch.manual_seed(0)
    model = tersor.models.create("longvq_lm", vocab_size=20, **SMALL).eval()
    torch.nn.init.normal_(model.backbone.layers[0].bias)
    ids = torch.randint(20, (2, 30))
    state, parts = None, []
    for piece in ids.split(pieces, 1):
        logits, state = model.prefill(piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-5)


def test_the_state_does_not_grow() -> None:
    model = tersor.models.create("longvq_lm", vocab_size=20, **SMALL).eval()

    def size(length: int) -> int:
        state = model.prefill(torch.zeros(1, length, dtype=torch.int64))[1]
        return sum(each.numel() for memory, vq in state for each in (memory, vq.count, vq.mean, vq.k, vq.v, vq.index))

    assert size(16) == size(160)


def test_what_follows_changes_nothing_before_it() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("longvq", vocab=9, causal=True, pool="none", **SMALL).eval()
    x = torch.randint(9, (1, 20))
    changed = x.clone()
    changed[0, 13] = (x[0, 13] + 1) % 9
    a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :13], b[:, :13])
    assert not torch.allclose(a[:, 13:], b[:, 13:])


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("longvq", vocab=9, **SMALL).eval()
    x = torch.randint(9, (1, 30))
    padded = x.clone()
    padded[:, 17:] = 3
    lengths = torch.tensor([17])
    torch.testing.assert_close(model(x, lengths), model(padded, lengths))
    torch.testing.assert_close(model(x[:, :17], lengths), model(x, lengths))


def test_keys_get_the_gradient_of_their_codewords_and_codewords_none() -> None:
    torch.manual_seed(0)
    book = Codebook(6, 4).eval()
    k = torch.randn(1, 5, 4, requires_grad=True)
    k_hat, index, _ = book(k)
    assert torch.equal(k_hat.detach(), book.codewords[index])
    weight = torch.randn(1, 5, 4)
    (k_hat * weight).sum().backward()
    assert torch.equal(k.grad, weight)
    assert not any(True for _ in book.parameters())


def test_the_codebook_moves_as_published() -> None:
    torch.manual_seed(0)
    book = Codebook(3, 2, decay=0.9).train()
    count, total = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([[4.0, 0.0], [0.0, 4.0], [-2.0, 0.0]])
    book.count.copy_(count)
    book.total.copy_(total)
    book.codewords.copy_(total / count[:, None])  # (1, 0), (0, 2), (-2, 0)
    keys = torch.tensor([[[1.5, 0.0], [0.5, 0.2], [0.0, 3.0]]])
    _, index, used = book(keys)
    assert index.tolist() == [[0, 0, 1]]
    assert used[0].tolist() == [1.0, 0.0]
    count = 0.9 * count + 0.1 * torch.tensor([2.0, 1.0, 0.0])
    total = 0.9 * total + 0.1 * torch.tensor([[2.0, 0.2], [0.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(book.count, count)
    torch.testing.assert_close(book.codewords, total / count[:, None])


def test_a_codeword_without_keys_is_placed_on_one() -> None:
    torch.manual_seed(0)
    book = Codebook(3, 2).train()
    book.count.copy_(torch.tensor([1.0, 0.001, 1.0]))
    book.codewords.copy_(torch.tensor([[9.0, 9.0], [50.0, 50.0], [8.0, 8.0]]))
    book.total.copy_(book.codewords)
    keys = torch.randn(1, 4, 2)
    used = book(keys)[2]
    assert any(torch.equal(used[1], key) for key in keys[0])
    assert torch.equal(used[[0, 2]], torch.tensor([[9.0, 9.0], [8.0, 8.0]]))
    moved = book.codewords.clone()
    book.eval()(keys)
    assert torch.equal(book.codewords, moved)  # evaluation moves nothing


def test_the_commitment_is_part_of_the_training(tmp_path: Any) -> None:
    """The trainer's loss is the objective's and the model's own."""
    from tersor.train.config import TrainConfig
    from tersor.train.trainer import train

    data = [{"x": torch.tensor([1, 2, 3, 4]), "target": torch.tensor(0)}] * 4
    losses = {}
    for beta in (0.0, 100.0):
        torch.manual_seed(0)
        model = tersor.models.create("longvq", vocab=9, beta=beta, **{**SMALL, "codes": 1})
        train(
            model,
            data,
            objective=answering,
            out=tmp_path / str(beta),
            config=TrainConfig(epochs=1, batch_size=4, device="cpu"),
        )
        row = (tmp_path / str(beta) / "log.csv").read_text().splitlines()[1].split(",")
        losses[beta] = float(row[3])
        told = model.auxiliary_loss().item()
    assert losses[100.0] - losses[0.0] == pytest.approx(told, rel=1e-3)
    assert told > 0


@pytest.mark.slow
def test_time_grows_with_the_length_not_with_its_square() -> None:
    model = tersor.models.create("longvq_lm", vocab_size=20, **{**SMALL, "block": 64, "codes": 64}).eval()

    def seconds(length: int) -> float:
        ids = torch.zeros(1, length, dtype=torch.int64)
        spent = []
        for _ in range(4):
            begin = time.process_time()
            with torch.no_grad():
                model(ids)
            spent.append(time.process_time() - begin)
        return min(spent)

    assert seconds(8192) < 3 * seconds(4096)  # twice, and room for noise; a square would be four times


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"d_state": 3}, "it is 3"),
        ({"decay": 1.0}, "they are 1.0, 0.01"),
        ({"block": 0}, "block of at least 1, not 0"),
        ({"pool": "max"}, "not 'max'"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.models.create("longvq", **{**SMALL, **wrong})
