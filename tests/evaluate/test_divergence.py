"""Divergence is validated by construction: distributions that are known, models that are known to be damaged."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.errors import TersorError


class Table(nn.Module):
    """Predicts by the last token alone: log-probabilities are given."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.log())

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows[input_ids]


P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)


def test_known_distributions_give_known_numbers() -> None:
    tokens = torch.tensor([0, 0, 1, 2, 1, 0, 1, 1, 2, 0, 2, 1])
    found = tersor.divergence(Table(Q), Table(P), tokens, seq_len=6, noise_floor=False)
    last, following = tokens.view(2, 6)[:, :-1], tokens.view(2, 6)[:, 1:]
    kl = (P * (P / Q).log()).sum(1)[last]  # [2 windows, 5]
    assert found.kl.mean == pytest.approx(kl.mean().item())
    assert found.kl.half_width == pytest.approx(12.7062 * kl.mean(1).std().item() / math.sqrt(2))
    assert found.reverse_kl.mean == pytest.approx((Q * (Q / P).log()).sum(1)[last].mean().item())
    assert found.kl_quantiles["max"] == pytest.approx(kl.max().item())
    assert found.same_top1.mean == pytest.approx((last != 0).double().mean().item())
    right, base_right = Q[last].argmax(-1) == following, P[last].argmax(-1) == following
    assert found.harmful_flips == pytest.approx((base_right & ~right).double().mean().item())
    assert found.helpful_flips == pytest.approx((~base_right & right).double().mean().item())
    losses = [-table[last, following].log().mean().item() for table in (Q, P)]
    assert found.perplexity.mean == pytest.approx(math.exp(losses[0]))
    assert found.ratio.mean == pytest.approx(math.exp(losses[0] - losses[1]))
    assert found.overlap == 1  # three tokens are all among ten


def test_equal_models_differ_by_nothing_and_damage_is_seen_in_its_place() -> None:
    torch.manual_seed(0)
    rows = torch.rand(50, 50, dtype=torch.float64).pow(4)
    rows /= rows.sum(1, keepdim=True)
    tokens = torch.randint(50, (64,))
    same = tersor.divergence(Table(rows), Table(rows), tokens, seq_len=16)
    assert same.kl.mean == same.harmful_flips == same.helpful_flips == 0
    assert same.ratio.mean == same.same_top1.mean == same.overlap == 1
    assert same.noise_floor is not None
    damaged = rows.clone()
    damaged[tokens[40]] = rows[tokens[40]].flip(0)  # what follows token 40
    found = tersor.divergence(Table(damaged), Table(rows), tokens, seq_len=16)
    assert found.passages[0].window == 40 // 16
    assert sum(each.tokens for each in found.buckets) == found.tokens == 4 * 15
    assert found.buckets[0].high <= found.buckets[-1].low


def test_fewer_bits_diverge_more_and_the_noise_floor_lies_below(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    source = tersor.load(small, dtype="float32")
    kl = {}
    for bits in (8, 4, 2):
        coarse = copy.deepcopy(source)
        for each in coarse.modules():
            if isinstance(each, nn.Linear):
                step = each.weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
                each.weight.data = (each.weight.data / step).round() * step
        found = tersor.divergence(coarse, source, torch.arange(512) % 311, seq_len=128)
        kl[bits] = found.kl.mean
        assert found.noise_floor is not None
        assert 0 < found.noise_floor < kl[bits] or bits == 8
    assert kl[8] < kl[4] < kl[2]
    ran = tersor_command(
        *("eval", small, "--against", small, "--seq-len", 64, "--max-windows", 2, "--json", "--device", "cpu")
    )
    told = json.loads(ran.out)
    assert told["kl"]["mean"] == 0
    assert told["windows"] == 2
    ran = tersor_command("eval", small, "--against", small, "--seq-len", 64, "--max-windows", 2)
    assert max(map(len, ran.out.splitlines()[:12])) <= 100
    assert "same choice      100" in ran.out


def test_what_cannot_be_compared_is_said() -> None:
    tokens = torch.arange(12) % 3
    for arguments, said in (
        ((Table(P), Table(torch.ones(3, 4) / 4), tokens, 6), "the vocabularies differ: 4 and 3 tokens"),
        ((Table(P), Table(P), tokens, 24), "less than one window of 24"),
        ((Table(P), Table(P * math.nan), tokens, 6), "not finite"),
        ((Table(P), Table(P), None, 6), "no tokenizer"),
    ):
        *models, text, seq_len = arguments
        with pytest.raises(TersorError, match=said):
            tersor.divergence(*models, text, seq_len=seq_len)
