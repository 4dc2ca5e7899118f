from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.series.gpt4battery import adapt, masked, masked_loss

SYSTEMS = ("gpt4battery", "gpt4battery_transformer", "gpt4battery_lstm")


def build(system: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create(system, **{**tersor.models.find(system).small, **overrides}).eval()


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_level_and_scale_come_out_and_a_zeroed_output_says_the_mean(system: str) -> None:
    model, src = build(system), torch.randn(3, 20, 1)
    scaled, plain = model(7 * src + 3), model(src)
    torch.testing.assert_close(scaled[0], 7 * plain[0] + 3, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model(src[:1])[1], plain[1][:1])  # by default a sample is by itself
    nn.init.zeros_(model.output_linear.weight)
    nn.init.zeros_(model.output_linear.bias)
    torch.testing.assert_close(model(src)[0], src.mean(1, keepdim=True).expand(3, 20, 1))


@pytest.mark.parametrize("system", SYSTEMS[:2])
@torch.no_grad()
def test_across_the_batch_a_result_depends_on_the_neighbours(system: str) -> None:
    model, src = build(system, across_batch=True), torch.randn(3, 20, 1)
    order = torch.tensor([1, 2, 0])
    assert not torch.allclose(model(src[order])[1], model(src)[1][order], atol=1e-4)
    if system == "gpt4battery":
        moved = build(system, across_batch=True)
        moved.positions[:3] = moved.positions[:3][order]  # the rows go with the samples
        torch.testing.assert_close(moved(src[order])[1], model(src)[1][order])


@pytest.mark.parametrize("system", SYSTEMS)
def test_adapting_changes_the_prompt_alone_and_lowers_the_loss(system: str) -> None:
    model, src = build(system), 1 + 0.2 * torch.randn(4, 20, 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = adapt(model, [src], ratio=0.0, lr=0.1, epochs=9)
    assert losses[-1] < losses[0]
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["soft_prompt"]
    with pytest.raises(TersorError, match="this model has none"):
        adapt(build(system, PPA=False), [src])


def test_masks_hide_whole_steps_and_count_the_whole_charge() -> None:
    torch.manual_seed(0)
    src = 1 + torch.rand(200, 49, 2)
    seen, hidden = masked(src, 0.3)
    assert torch.equal(seen == 0, hidden.expand_as(src))
    assert 0.28 < hidden.float().mean() < 0.32
    model = build("gpt4battery_lstm", input_dim=2)
    assert masked_loss(model, src, ratio=0.0).allclose((model(src)[0] - src).square().mean())


@torch.no_grad()
def test_the_reprogrammed_form_reads_health_and_charge_over_all_positions() -> None:
    model, charges = build("gpt4battery_reprogram"), torch.randn(2, 49, 1)
    health, charge = model.health_and_charge(charges)
    assert (health.shape, charge.shape) == ((2, 1), (2, 49))
    torch.testing.assert_close(health, model.mainhead(model(charges).squeeze(-1)))
