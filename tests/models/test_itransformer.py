from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.compress import GPTQ, compress
from tersor.errors import TersorError

SMALL = {"seq_len": 24, "pred_len": 12, "d_model": 32, "d_ff": 64, "n_heads": 4}


def build(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("itransformer", **{**SMALL, **overrides}).eval()


@torch.no_grad()
def test_takes_any_number_of_variates_in_any_order() -> None:
    model, x = build(), torch.randn(2, 24, 11)
    order = torch.randperm(11)
    torch.testing.assert_close(model(x[:, :, order]), model(x)[:, :, order])
    assert model(x[:, :, :3]).shape == (2, 12, 3)


@torch.no_grad()
def test_the_norm_takes_level_and_scale_out() -> None:
    x = torch.randn(2, 24, 5)
    torch.testing.assert_close(build()(7 * x + 3), 7 * build()(x) + 3, rtol=1e-4, atol=1e-3)
    plain = build(use_norm=False)
    assert not torch.allclose(plain(7 * x + 3), 7 * plain(x) + 3, atol=1e-2)


def test_the_gradient_stops_at_the_mean_alone() -> None:
    x = torch.randn(1, 24, 1, requires_grad=True)
    model = build()
    nn.init.zeros_(model.get_parameter("projector.weight"))
    nn.init.ones_(model.get_parameter("projector.bias"))
    model(x).sum().backward()  # the forecast is s + m at each of the 12 steps, so only s has a gradient
    window = x.detach()
    spread = (window.var(1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(x.grad, 12 * (window - window.mean(1, keepdim=True)) / (24 * spread))


@torch.no_grad()
def test_attention_maps_on_request_do_not_change_the_forecast() -> None:
    inputs = build().example_inputs(2)
    forecast, maps = build(output_attention=True)(**inputs)
    torch.testing.assert_close(forecast, build()(**inputs))
    assert [each.shape for each in maps] == [(2, 4, 11, 11)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 11))


@torch.no_grad()
def test_heads_that_do_not_divide_make_narrower_projections() -> None:
    model = build(d_model=30)
    assert model.get_parameter("encoder.attn_layers.0.attention.query_projection.weight").shape == (28, 30)
    assert model(**model.example_inputs(1)).shape == (1, 12, 7)


def test_published_convolutions_of_kernel_one_are_accepted() -> None:
    model = build()
    state = {
        key: value[..., None] if "conv" in key and value.dim() == 2 else value
        for key, value in model.state_dict().items()
    }
    loaded = tersor.models.load("itransformer", state, **SMALL)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


@torch.no_grad()
def test_gptq_compresses_every_linear_of_the_layers() -> None:
    model = build()
    batches = [model.example_inputs(4) for _ in range(4)]
    result = compress(model, GPTQ(bits=8, group_size=32), calibration=batches)
    assert len(result.summary.layers) == 2 * 6
    inputs = model.example_inputs(2)
    torch.testing.assert_close(result.model(**inputs), model(**inputs), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"activation": "swish"}, "not 'swish'"),
        ({"n_heads": 64}, "d_model 32 into 64 heads"),
        ({"pred_len": 0}, "pred_len of at least 1, not 0"),
    ],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError) as error:
        build(**overrides)
    assert said in str(error.value)
