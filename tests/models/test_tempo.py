from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError

SMALL = tersor.models.find("tempo_80m").small


def build(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("tempo", **{**SMALL, **overrides}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_variates_are_by_themselves_and_level_and_scale_come_out() -> None:
    model, x = build(), torch.randn(2, 32, 3)
    torch.testing.assert_close(model(x)[:, :, 1:2], model(x[:, :, 1:2]))
    torch.testing.assert_close(model(7 * x + 3), 7 * model(x) + 3, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_merged_lora_forecasts_the_same() -> None:
    model, x = build(), torch.randn(2, 32, 1)
    before = model(x)
    weight = model.get_parameter("gpt2_trend.h.0.attn.c_attn.base_layer.weight").clone()
    model.merge_lora()
    assert not torch.equal(model.get_parameter("gpt2_trend.h.0.attn.c_attn.base_layer.weight"), weight)
    torch.testing.assert_close(model(x), before)


@torch.no_grad()
def test_the_trend_does_not_see_the_residual_and_the_heads_add_up() -> None:
    model, x = build(), torch.randn(2, 32, 1)
    hidden: list[torch.Tensor] = []
    model.gpt2_trend.register_forward_hook(lambda _module, _inputs, result: hidden.append(result))
    whole = model(x)
    model.in_layer_noise.weight.zero_()
    model(x)
    length = hidden[0].shape[1] // 3
    assert torch.equal(hidden[0][:, : 2 * length], hidden[1][:, : 2 * length])
    assert not torch.allclose(hidden[0][:, 2 * length :], hidden[1][:, 2 * length :])
    model = build()
    share = model._head("season", hidden[0].chunk(3, 1)[1])
    nn.init.zeros_(model.out_layer_season.weight)
    nn.init.zeros_(model.out_layer_season.bias)
    spread = (x.var(1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close((whole - model(x)).squeeze(-1), share * spread, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_pool_gives_each_sample_the_prompts_nearest_to_its_summary() -> None:
    model = build(pool=True)
    tokens = torch.randn(2, model.config.patches, 8)
    summary = model.summary_map(tokens.reshape(-1, model.config.patches)).reshape(2, 8)
    model.prompt_key_dict["prompt_key_17"].copy_(5 * summary[1])
    chosen = model._chosen(tokens)
    assert chosen.shape == (2, 9, 8)
    assert torch.equal(chosen[1, :3], model.prompt_value_dict["prompt_value_17"])
    assert model(torch.randn(2, 32, 1)).shape == (2, 8, 1)
    assert build(prompt=0)(torch.randn(2, 32, 1)).shape == (2, 8, 1)


@torch.no_grad()
def test_forecasts_of_any_look_back_and_horizon() -> None:
    model, x = build(), torch.randn(1, 40, 2)
    long = model.forecast(x, 20)
    torch.testing.assert_close(long[:, :8], model(x[:, -32:]))
    torch.testing.assert_close(long[:, 8:16], model(torch.cat((x[:, -24:], long[:, :8]), 1)))
    torch.testing.assert_close(model.forecast(x[:, :20], 8), model(torch.cat((x[:, :20], x[:, :12]), 1)))
    padded = torch.cat((x[:, :10].mean(1, keepdim=True).expand(-1, 22, -1), x[:, :10]), 1)
    torch.testing.assert_close(model.forecast(x[:, :10], 8), model(padded))


@pytest.mark.parametrize(("loss_func", "parts"), [("prob", 3), ("negative_binomial", 2)])
def test_distributions_are_fitted_by_their_likelihood(loss_func: str, parts: int) -> None:
    from tersor.models.series.tempo import likelihood_loss

    model = build(loss_func=loss_func)
    parameters = model(torch.randn(2, 32, 3))
    assert [each.shape for each in parameters] == [(2, 8, 3)] * parts
    target = torch.randint(5, (2, 8, 3)).float()
    if parts == 3:
        mu, sigma, nu = parameters
        known = torch.distributions.StudentT(nu, mu, sigma)
    else:
        mu, alpha = parameters  # torch counts successes: the share of them is alpha mu / (1 + alpha mu)
        known = torch.distributions.NegativeBinomial(1 / alpha, probs=alpha * mu / (1 + alpha * mu))
    torch.testing.assert_close(likelihood_loss(parameters, target), -known.log_prob(target).mean())


@torch.no_grad()
def test_takes_openai_weights_under_the_lora_and_trains_only_that() -> None:
    model = build(vocab_size=29600)
    own = {key: value for key, value in model.gpt2_trend.state_dict().items() if "lora_" not in key}
    turned = ("c_attn.base_layer.weight", "c_fc.weight", "c_proj.weight")
    openai = {
        "transformer." + key.replace(".base_layer", ""): torch.randn_like(value.T if key.endswith(turned) else value)
        for key, value in own.items()
    }
    openai |= {"lm_head.weight": torch.zeros(1), "transformer.h.0.attn.bias": torch.zeros(1)}
    openai["transformer.h.1.ln_1.weight"] = torch.zeros(8)  # a block that this trunk does not have
    model.load_gpt2(openai)
    assert torch.equal(model.gpt2_trend.h[0].mlp.c_fc.weight, openai["transformer.h.0.mlp.c_fc.weight"].T)
    assert torch.equal(model.gpt2_trend.wpe.weight, openai["transformer.wpe.weight"])
    trained = {name for name, parameter in model.gpt2_trend.named_parameters() if parameter.requires_grad}
    layer = "h.0.attn.c_attn."
    low_rank = {f"{layer}lora_A.default.weight", f"{layer}lora_B.default.weight"}
    assert trained == {*low_rank, f"{layer}base_layer.bias"}
    with pytest.raises(TersorError, match="cannot take this GPT-2"):
        model.load_gpt2({"wte.weight": torch.zeros(1)})
