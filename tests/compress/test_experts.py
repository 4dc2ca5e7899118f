"""Mixtures of experts: who is calibrated by which tokens, and what becomes of an expert that sees few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, TersorError
from tersor.calibrate.hessian import Hessian, shrink_towards_mean
from tersor.calibrate.routing import Routing, parse_routing, routed
from tersor.calibrate.statistics import is_expert, watch_inputs
from tersor.compress.result import Compressed
from tersor.layers.linear_map import linear_maps

TOKENS = 4 * 24
SLOW = ("qwen3_moe", "deepseek_v3", "gpt_oss", "jamba")
FUSED = ["mixtral", "llama4", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def compressed(model: str, **options: Any) -> Compressed:
    return tersor.compress(build(model), GPTQ(group_size=32), calibration=samples(model, 4), format=None, **options)


def tokens_of(result: Compressed) -> dict[str, list[int]]:
    """Tokens of every expert of each stack, in order."""
    found: dict[str, list[int]] = defaultdict(list)
    for layer in result.summary.layers:
        if is_expert(layer.name):
            found[layer.name.rpartition(".")[0]].append(layer.tokens)
    assert found
    return found


@pytest.mark.parametrize("model", FUSED)
def test_each_token_counts_for_the_experts_that_the_router_chose(model: str) -> None:
    chosen = 1 if model == "llama4" else 2
    for stack, tokens in tokens_of(compressed(model)).items():
        assert len(tokens) == 4
        assert sum(tokens) == chosen * TOKENS, stack
        assert len(set(tokens)) > 1


@pytest.mark.parametrize("model", FUSED)
def test_each_token_counts_for_more_experts_where_top_k_is_raised(model: str) -> None:
    asked = compressed(model, experts="top-k:3")
    for stack, tokens in tokens_of(asked).items():
        assert sum(tokens) == 3 * TOKENS, stack


@pytest.mark.parametrize("model", FUSED)
def test_each_token_counts_for_every_expert_on_request(model: str) -> None:
    asked, usual = compressed(model, experts="all"), compressed(model)
    for stack, tokens in tokens_of(asked).items():
        assert tokens == [TOKENS] * 4, stack
    of = {layer.name: layer for layer in usual.summary.layers}
    changed = [layer for layer in asked.summary.layers if layer.error != of[layer.name].error]
    assert any(is_expert(layer.name) for layer in changed)


@pytest.mark.parametrize("model", FUSED)
def test_a_token_counts_by_the_routers_weight_where_all_experts_see_it(model: str) -> None:
    """Against sums made by hand from what the router says of the experts' inputs."""
    whole: Any = build(model)
    whole.set_experts_implementation("eager")
    block = whole.model.layers[1]
    (mixture,) = (each for each in block.modules() if isinstance(getattr(each, "gate_up_proj", None), nn.Parameter))
    seen: list[tuple[Any, ...]] = []
    owner = next(each for each in block.modules() if any(child is mixture for child in each.children()))
    hidden = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(3))
    experts = {name: each for name, each in linear_maps(mixture).items() if name.startswith("gate_up")}
    hessians = {name: Hessian(64) for name in experts}
    with torch.no_grad(), routed(block, Routing(0)) as rows:
        mixture.register_forward_pre_hook(lambda module, args: seen.append(args))

        def note(name: str, x: Tensor) -> None:
            hessians[name].add(x, 1, rows.weights)

        with watch_inputs(experts, note):
            owner(hidden)
    if len(seen[0]) == 1:  # scaled by the router's weights already
        per_expert = seen[0][0].view(4, 10, 64)
        expected = [x.t() @ x for x in per_expert]
    else:
        x, index, weights = seen[0]
        assert index.shape == (10, 4)
        every = torch.zeros(10, 4).scatter(1, index, weights)
        assert every.std() > 0.01
        expected = [x.t() @ (every[:, n, None] * x) for n in range(4)]
        assert hessians["gate_up_proj.2"].weight == pytest.approx(float(every[:, 2].sum()), rel=1e-5)
    for n, total in enumerate(expected):
        torch.testing.assert_close(hessians[f"gate_up_proj.{n}"].total, total.double(), rtol=1e-4, atol=1e-5)


def test_the_model_computes_the_same_however_its_statistics_are_gathered() -> None:
    """One after another over all tokens is the same sum over experts; and routing is as before afterwards."""
    model: Any = build("mixtral")
    model.set_experts_implementation("eager")
    block, hidden = model.model.layers[0].mlp, torch.randn(1, 10, 64)
    with torch.no_grad():
        before = block(hidden)
        for router in (each for each in block.modules() if hasattr(each, "top_k")):
            router.top_k = 4
        every = block(hidden)
        for router in (each for each in block.modules() if hasattr(each, "top_k")):
            router.top_k = 2
        with routed(block, Routing(0)):
            torch.testing.assert_close(block(hidden), every)
        assert torch.equal(block(hidden), before)


@pytest.mark.parametrize("experts", ["as-is", "top-k:3", "all"])
def test_a_checkpoint_says_the_same_as_a_module_in_memory(tmp_path: Path, experts: str) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    options = {"calibration": samples("mixtral", 4), "experts": experts}
    on_disk = tersor.compress(tmp_path / "model", GPTQ(group_size=32), **options)
    in_memory = tersor.compress(build("mixtral"), GPTQ(group_size=32), **options)
    assert [each.tokens for each in on_disk.summary.layers] == [each.tokens for each in in_memory.summary.layers]
    for one, other in zip(on_disk.summary.layers, in_memory.summary.layers, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)


def test_experts_that_take_turns_are_solved_like_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean that they are moved towards is that of the whole layer."""
    at_once = compressed("mixtral")
    monkeypatch.setattr("tersor.methods.block.STATISTICS_MEMORY", 1)
    in_turns = compressed("mixtral")
    for one, other in zip(at_once.summary.layers, in_turns.summary.layers, strict=True):
        assert (one.name, one.tokens) == (other.name, other.tokens)
        assert one.error == pytest.approx(other.error, rel=1e-5)


def test_the_less_an_expert_saw_the_nearer_its_hessian_is_to_the_layers_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hessians = {name: Hessian(8) for name in ("none", "few", "many")}
    hessians["few"].add(torch.randn(2, 8, generator=generator), 1)
    hessians["many"].add(3 * torch.randn(4000, 8, generator=generator), 1)
    shrunk = shrink_towards_mean(hessians)
    mean = 2 * (hessians["few"].total + hessians["many"].total).float() / 4002
    torch.testing.assert_close(shrunk["none"], mean)
    own = 2 * hessians["few"].total.float() / 2
    torch.testing.assert_close(shrunk["few"], (2 * own + 8 * mean) / 10)
    torch.testing.assert_close(shrunk["many"], 2 * hessians["many"].total.float() / 4000, rtol=1e-2, atol=1e-2)
    assert shrink_towards_mean({"none": Hessian(8)})["none"].any().logical_not()


def starved(model: nn.Module) -> nn.Module:
    """Of four experts, the last is never chosen."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.gate.weight.data[3] = 0  # type: ignore[union-attr,index,operator]
        layer.mlp.gate.weight.data[0] *= 50  # type: ignore[union-attr,index,operator]
        layer.mlp.gate.weight.data[1] *= -50  # type: ignore[union-attr,index,operator]
    return model


def test_an_expert_that_no_token_reaches_is_reported_and_solved_all_the_same() -> None:
    batches = [{"input_ids": torch.full((1, 1), 5)}]  # one token reaches two of four experts
    result = tersor.compress(starved(build("mixtral")), GPTQ(group_size=32), calibration=batches)
    unseen = [layer for layer in result.summary.layers if ".experts." in layer.name and layer.tokens == 0]
    assert unseen
    assert {layer.note for layer in unseen} == {
        "no calibration token reached it: solved with the mean of its layer's experts"
    }
    all_of_them = tersor.compress(build("mixtral"), GPTQ(group_size=32), calibration=batches, experts="all")
    assert min(layer.tokens for layer in all_of_them.summary.layers) == 1
    assert not any("no calibration token" in layer.note for layer in all_of_them.summary.layers)


def test_coverage_is_printed(
    tersor_command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("tersor.compress.samples.make_batches", lambda *args, **kwargs: samples("mixtral", 4))
    command = ("quantize", tmp_path / "model", "--group-size", 32)
    ran = tersor_command(*command, "--out", tmp_path / "out", "--experts", "all")
    assert ran.status == 0, ran.err
    assert f"16 experts, calibrated with {TOKENS} to {TOKENS} tokens each; none without" in ran.out
    ran = tersor_command(*command, "--out", tmp_path / "other")
    assert "16 experts, calibrated with " in ran.out
    assert "model.layers.1.mlp.experts.down_proj.3" in ran.out.replace("\n", "")


class Listed(nn.Module):
    """Experts that are modules in a list, each called with the tokens that are sent to it."""

    def __init__(self, top_k: int | None = 1) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        if top_k is not None:
            self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(getattr(self, "top_k", 1))
        y = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            token, place = torch.where(index == n)
            y = y.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return x + y


def listed(**options: Any) -> dict[str, list[int]]:
    torch.manual_seed(0)
    top_k = options.pop("top_k", 1)
    model = nn.Sequential(Listed(top_k), Listed(top_k))
    batches = [torch.randn(10, 32) for _ in range(4)]
    result = tersor.compress(model, GPTQ(group_size=32), calibration=batches, format=None, **options)
    found: dict[str, list[int]] = defaultdict(list)
    for layer in result.summary.layers:
        found[layer.name.partition(".")[0]].append(layer.tokens)
    return found


def test_experts_in_a_list_follow_a_raised_top_k() -> None:
    assert {name: sum(tokens) for name, tokens in listed().items()} == {"0": 40, "1": 40}
    assert {name: sum(tokens) for name, tokens in listed(experts="top-k:3").items()} == {"0": 120, "1": 120}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "all"}, "modules in a list, .*use --experts top-k:N"),
        ({"experts": "top-k:2", "top_k": None}, "keeps the number of experts a token as `top_k`; use --experts as-is"),
    ],
)
def test_what_experts_in_a_list_do_not_show_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        listed(**options)


@pytest.mark.parametrize("number", [1, 5])
def test_a_number_that_does_not_raise_is_refused(number: int) -> None:
    with pytest.raises(TersorError, match="has 4 experts and sends a token to 2; give a number from 2 to 4"):
        compressed("mixtral", experts=f"top-k:{number}")


@pytest.mark.parametrize("text", ["", "some", "top-k", "top-k:", "top-k:0", "top-k:-1", "top-k:2.5", "2"])
def test_another_word_is_refused(text: str) -> None:
    with pytest.raises(TersorError, match="is not one of as-is, top-k:N"):
        parse_routing(text)
