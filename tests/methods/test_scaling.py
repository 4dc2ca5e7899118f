"""SmoothQuant and AWQ's scaling: the same function in the same architecture, the formulas, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tersor
import tersor.models
from tersor import RTN, TersorError
from tersor.compress import from_options
from tersor.methods.method import ModelMethod
from tersor.methods.weights.awq_scale import AWQScale
from tersor.methods.weights.scale_places import gain_of
from tersor.methods.weights.smoothquant import SmoothQuant, scales

METHODS = [SmoothQuant(), AWQScale(bits=3, group_size=16)]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
DECODER: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 4, "max_position_embeddings": 32}


def model_of(kind: str, **other: Any) -> Any:
    """A small float32 model whose channels and weights differ enough that every mistake shows."""
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, **other})),
        "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, head_dim=8)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=48)),
    }
    model = configs[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    return model


def samples(count: int = 3) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, 16), generator=drawn)} for _ in range(count)]


def applied(model: nn.Module, method: ModelMethod, **other: Any) -> Any:
    return tersor.compress(model, method, calibration=samples(), **other)


def sources(result: Any) -> dict[str, str]:
    """What was scaled: the readers by their source."""
    rows = [layer.row() for layer in result.summary.layers]
    return {row["name"]: row["readers"] for row in rows if row["readers"]}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "opt"])
def test_the_model_computes_the_same_with_other_weights(kind: str, method: ModelMethod) -> None:
    model = model_of(kind)
    result = applied(model, method)
    x = samples(4)[-1]
    expected, found = model(**x).logits, result.model(**x).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    old, new = model.state_dict(), result.model.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    scaled = sources(result)
    assert len(scaled) >= 4
    for source, readers in scaled.items():
        for name in (source, *readers.split(", ")):
            assert f"{name}.weight" in changed, name


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_a_vit_computes_the_same(method: ModelMethod) -> None:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model: Any = tersor.models.create("vit", **options).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    images = [{"image": torch.randn(1, 3, 16, 16)} for _ in range(3)]
    result = tersor.compress(model, method, calibration=images)
    assert len(sources(result)) >= 4
    expected = model(**images[0])
    assert not torch.equal(result.model.blocks[1].norm2.weight, model.blocks[1].norm2.weight)
    assert (result.model(**images[0]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_values_go_into_outputs_and_up_into_down_where_that_is_exact() -> None:
    at = "model.layers.0"
    found = {k: v for k, v in sources(applied(model_of("llama"), METHODS[1])).items() if k.startswith(at)}
    assert found == {
        f"{at}.input_layernorm": f"{at}.self_attn.q_proj, {at}.self_attn.k_proj, {at}.self_attn.v_proj",
        f"{at}.post_attention_layernorm": f"{at}.mlp.gate_proj, {at}.mlp.up_proj",
        f"{at}.self_attn.v_proj": f"{at}.self_attn.o_proj",
        f"{at}.mlp.up_proj": f"{at}.mlp.down_proj",
    }
    grouped = sources(applied(model_of("llama", num_key_value_heads=2), METHODS[1]))
    assert f"{at}.self_attn.v_proj" not in grouped
    assert len(sources(applied(model_of("llama"), AWQScale(bits=3, group_size=16, linears=False)))) == 4
    opt = sources(applied(model_of("opt"), METHODS[1]))  # a ReLU lets scales through, GPT-2's GELU does not
    assert opt["model.decoder.layers.1.fc1"] == "model.decoder.layers.1.fc2"
    assert not any("mlp.c_fc" in source for source in sources(applied(model_of("gpt2"), METHODS[1])))


def test_what_a_norm_multiplies_with_is_seen() -> None:
    gemma = model_of("gemma").model.layers[0]
    assert gain_of(gemma.input_layernorm) == 1
    assert gain_of(model_of("llama").model.layers[0].input_layernorm) == 0
    assert gain_of(nn.LayerNorm(8)) == 0
    assert gain_of(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert gain_of(nn.Linear(8, 8)) is None
    assert gain_of(nn.Embedding(8, 8)) is None
    assert gain_of(nn.PReLU(8)) is None


@torch.no_grad()
def test_norms_that_something_else_reads_are_left_alone() -> None:
    with pytest.raises(TersorError, match=r"smoothquant needs a norm .* BertModel .*leave smoothquant out"):
        applied(model_of("bert"), SmoothQuant(linears=False))  # post-norm: the residual connection reads them


@torch.no_grad()
def test_a_norm_that_experts_read_is_left_alone_with_a_line() -> None:
    model = model_of("mixtral")
    result = applied(model, METHODS[1])
    notes = {layer.name: layer.row()["note"] for layer in result.summary.layers}
    assert "expert" in notes["model.layers.1.post_attention_layernorm"]
    assert "model.layers.1.input_layernorm" in sources(result)
    x = samples(4)[-1]
    expected = model(**x).logits
    assert (result.model(**x).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tied_layers_are_left_alone_with_a_line() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    result = applied(model, METHODS[1])
    notes = {layer.name: layer.row()["note"] for layer in result.summary.layers}
    assert "tied" in notes["model.layers.0.post_attention_layernorm"]
    x = samples(4)[-1]
    expected = model(**x).logits
    assert (result.model(**x).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_layer_that_is_not_asked_for_keeps_its_weights() -> None:
    model = model_of("llama")
    result = applied(model, METHODS[0], exclude=["*.mlp.up_proj"])
    for name, value in model.state_dict().items():
        if ".mlp." in name:
            assert torch.equal(value, result.model.state_dict()[name]), name
    assert "not asked for" in {layer.name: layer.note for layer in result.summary.layers}["model.layers.0.mlp.up_proj"]


def test_a_model_without_norms_is_refused_in_one_line() -> None:
    plain = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    with pytest.raises(TersorError, match="awq-scale needs a norm") as raised:
        tersor.compress(plain, AWQScale(group_size=-1), calibration=[torch.randn(4, 8)])
    assert "\n" not in str(raised.value)


def test_smoothing_makes_activations_and_weights_meet_halfway() -> None:
    x, W = torch.tensor([8.0, 0.5, 0.0, 2.0]), torch.tensor([[0.5, -2.0, 1.0, 0.0], [0.25, 1.0, -3.0, 0.0]])
    s = scales(x, [W], 0.5)
    assert s.tolist() == pytest.approx([4.0, 0.5, 1.0, 1.0])
    assert (x / s)[:2].tolist() == pytest.approx((W.abs().amax(0) * s)[:2].tolist())
    assert scales(x, [W[:1], W[1:]], 1.0)[0] == 8


@torch.no_grad()
def test_the_searched_error_is_that_of_the_rounded_layers_outputs_and_the_least_of_the_grid() -> None:
    torch.manual_seed(0)
    X = torch.randn(200, 32) * torch.logspace(-1, 1, 32)
    weights, method = [torch.randn(24, 32), torch.randn(8, 32)], AWQScale(bits=3, group_size=16)
    alpha, s, plain, scaled = method.search(weights, X.abs().mean(0), X.T @ X)
    W = torch.cat(weights)

    def lost(s: Tensor) -> float:
        rounded = nn.Linear(32, 32, bias=False)
        rounded.weight.copy_(W * s)
        module: Any = tersor.compress(nn.Sequential(rounded), RTN(bits=3, group_size=16), format=None).model
        return float((module(X / s) - X @ W.T).square().sum() / (X @ W.T).square().sum())

    assert plain == pytest.approx(lost(torch.ones(32)), rel=1e-2)  # the file's float16 steps
    assert scaled == pytest.approx(lost(s), rel=1e-2)
    assert 0 < alpha < 1
    assert scaled < 0.9 * plain
    everything = [method.error(W, X.T @ X, each) for _, each in method.candidates(X.abs().mean(0))]
    assert min(everything) == pytest.approx(method.error(W, X.T @ X, s))
    assert s.max() * s.min() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["smoothquant", "awq-scale"])
def test_saved_it_loads_in_transformers_and_can_be_rounded_in_one_job(tmp_path: Path, name: str) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "model")
    method = from_options(name, {} if name == "smoothquant" else {"bits": 4, "group_size": 16})
    tersor.compress(str(tmp_path / "model"), method, calibration=samples(), out=tmp_path / "scaled")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
    x = samples(4)[-1]
    with torch.no_grad():
        expected = model(**x).logits
        assert (loaded(**x).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    steps = [method, RTN(bits=4, group_size=16)]
    done = tersor.compress(str(tmp_path / "model"), steps, calibration=samples(), out=tmp_path / "both")
    assert [step["name"] for step in done.summary.steps] == [name, "rtn"]


def test_groups_that_do_not_fit_are_named() -> None:
    with pytest.raises(TersorError, match="group size 128 does not divide the 32 inputs"):
        applied(model_of("llama"), AWQScale())


@pytest.mark.parametrize(("name", "options"), [("smoothquant", {"alpha": 1.5}), ("awq-scale", {"grid": 0})])
def test_bad_options_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(TersorError, match=r"alpha=1.5|grid=0"):
        from_options(name, options)
