"""Linformer beyond its golden cases: reversible layers, contexts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.text.linformer import Attention, LinformerConfig

SMALL = {"dim": 32, "seq_len": 24, "depth": 3, "k": 8, "heads": 4}


def build(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("linformer", **{**SMALL, **overrides})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_reversible_layers_have_the_gradients_of_plain_backpropagation(dropout: float) -> None:
    model = build(reversible=True, dropout=dropout).double().train()
    x = torch.randn(2, 24, 32, dtype=torch.float64)

    def gradients(run: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        run(leaf).square().sum().backward()
        found = [leaf.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return found

    def plain(leaf: Tensor) -> Tensor:
        x1 = x2 = leaf
        for block in model.net.blocks:
            x1, x2 = block(x1, x2)
        return x1 + x2

    torch.testing.assert_close(gradients(model), gradients(plain))
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert "net.blocks.0.f.net.fn.to_q.weight" in model.state_dict()


@torch.no_grad()
def test_keys_and_values_come_from_the_context() -> None:
    torch.manual_seed(0)
    layer = Attention(LinformerConfig(**SMALL, one_kv_head=True, dim_head=12))
    x, context = torch.randn(2, 50, 32), torch.randn(2, 7, 32)  # queries may be more than seq_len
    assert layer(x, context).shape == x.shape
    padded = torch.cat([context, torch.zeros(2, 17, 32)], 1)  # without biases, zeros add nothing
    torch.testing.assert_close(layer(x, padded), layer(x, context))
    assert layer.to_q.weight.shape == (48, 32)
    assert layer.to_k.weight.shape == (12, 32)


@torch.no_grad()
def test_every_output_sees_every_position() -> None:
    model, x = build().eval(), torch.randn(1, 24, 32)
    changed = x.clone()
    changed[:, -1] = torch.randn(32)  # not a shift, which the norms take out
    assert (model(changed) - model(x))[0].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"k": 0}, "k of at least 1, not 0"), ({"heads": 5}, "dim 32 into 5 heads")],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        build(**overrides)


def test_refuses_inputs_that_are_too_long() -> None:
    with pytest.raises(TersorError, match="at most 24 tokens, not 25"):
        build()(torch.randn(1, 25, 32))
    model = tersor.models.create("linformer_lm", **SMALL, num_tokens=9)
    with pytest.raises(TersorError, match="at most 24 tokens, not 25"):
        model(torch.zeros(1, 25, dtype=torch.long))
