"""Q-HyViT: bridges found by running, steps found by search, what is chosen a layer, what is stored, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersor
from tersor.errors import TersorError
from tersor.formats.twin_grid import SplitGrid
from tersor.layers.quantized_map import QuantizedMap
from tersor.layers.quantized_products import QuantizedProducts
from tersor.methods.activations.hybrid_parts import bridges, fold_norms, trace
from tersor.methods.activations.interval_search import (
    MapProblem,
    ProductGrids,
    ProductProblem,
    Record,
    Search,
    asymmetric,
    best_steps,
    looks_like_gelu,
    overflows,
)
from tersor.methods.activations.q_hyvit import QHyViT, loss_of, prepare, solve, watch
from tersor.methods.activations.repquant import quantizable_maps
from tersor.methods.activations.watched import WatchedMap
from tersor.methods.method import Work
from tersor.models.registry import find

HYBRIDS = ["mobilevit", "mobilevitv2", "efficientformer", "efficientformerv2"]
QUICK = {"num_candidates": 5, "rounds": 1}
SHORT = Search(count=20, rounds=1)
seeds = st.integers(0, 1000)


def small(system: str) -> nn.Module:
    """A model with norms that have seen data, in evaluation mode."""
    torch.manual_seed(0)
    model = tersor.models.create(system, **find(system).small)
    with torch.no_grad():
        model(**model.example_inputs(4))
    return model.eval()


def samples_of(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"image": each[None, :, :64, :64]} for each in model.example_inputs(count)["image"]]


def logits(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return model(torch.cat([each["image"] for each in samples]))


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    return quantizable_maps(model, lambda name: True, {}, grouped=True)


def convolution(groups: int, spread: Tensor) -> MapProblem:
    torch.manual_seed(2)
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups).double()
    x = torch.randn(3, 6, 7, 7).double() * spread.double()[:, None, None]
    with torch.no_grad():
        output = layer(x)
    return MapProblem(layer, [Record((x,), output, torch.randn_like(output))], 8, 4)


def solved(problem: MapProblem, *, channelwise: bool, zero_point: bool = False) -> Any:
    input = problem.first_input(channelwise=channelwise, zero_point=zero_point)
    first = problem.start(input, channelwise=channelwise, blocks=(len(problem.W), 1))
    return problem.rounds(first, first, Search(rounds=1))


def test_the_bridges_of_mobilevit_are_those_that_the_published_code_lists() -> None:
    model = tersor.models.create("mobilevit_s").eval()
    traced = trace(model, maps_of(model), {"image": torch.randn(1, 3, 64, 64)})
    order = list(dict.fromkeys(traced.events))
    numbered: list[str] = []
    for name, what in order:  # its numbers count layers and both products, qkv first
        if what != "softmax":
            numbered += [name] * (2 if what == "product" else 1)
    found = [numbered.index(name) for bridge in bridges(model, traced) for name in bridge]
    assert found == [17, 18, 36, 37, 67, 68]


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        ("mobilevitv2", [["stages.2.1.conv_1x1", "stages.2.1.transformer.0.attn.qkv_proj"]]),
        ("efficientformer", [["network.6.0.mlp.fc2", "network.6.2.token_mixer.qkv"]]),
        (
            "efficientformerv2",
            [
                [
                    "network.4.0.mlp.fc2",
                    *(f"network.4.1.token_mixer.{each}.0" for each in ("stride_conv", "q", "k", "v")),
                ],
                ["network.6.0.mlp.fc2", *(f"network.6.1.token_mixer.{each}.0" for each in ("q", "k", "v"))],
            ],
        ),
        ("vit", [["patch_embed.proj", "blocks.0.attn.qkv"]]),
    ],
)
def test_bridges_of_other_models_are_found(system: str, wanted: list[list[str]]) -> None:
    model = small(system)
    found = bridges(model, trace(model, maps_of(model), samples_of(model, 1)[0]))
    assert found[: len(wanted)] == wanted


def test_a_bridge_is_found_whatever_the_classes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    class Residual(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    def layer() -> nn.Module:
        return nn.Sequential(Residual(Attention()), Residual(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), Tokens(), nn.Sequential(layer(), layer()), nn.Linear(8, 4)
    )
    traced = trace(model, maps_of(model), {"args": (torch.randn(1, 3, 6, 6),)})
    assert bridges(model, traced) == [["1", "3.0.0.inner.qkv"]]
    assert traced.of_image == {"0"}


@pytest.mark.parametrize("system", HYBRIDS)
def test_folding_norms_leaves_the_function_and_makes_them_identities(system: str) -> None:
    model = small(system).double()
    samples = [{"image": each["image"].double()} for each in samples_of(model)]
    before = logits(model, samples)
    folded = fold_norms(model, maps_of(model), samples[0])
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    assert 0 < folded <= len(norms)
    identities = [each for each in norms if not bool(each.running_mean.any()) and not bool(each.bias.any())]
    assert len(identities) >= folded
    assert torch.allclose(logits(model, samples), before, rtol=1e-9, atol=1e-12)


def test_a_norm_whose_convolution_another_reads_is_left() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.last, self.last_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last_norm(self.last(self.norm(y) + self.other(y)))

    torch.manual_seed(0)
    model = Shared()
    for _ in range(20):
        model(torch.randn(8, 3, 5, 5) * 3 + 1)
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    before, kept = model(x), model.norm.running_var.clone()
    assert fold_norms(model, maps_of(model), {"args": (x,)}) == 1
    assert torch.equal(model.norm.running_var, kept)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_depthwise_with_channels_alike_is_the_same_with_one_grid_and_with_one_a_channel() -> None:
    problem = convolution(6, torch.ones(6))
    x = problem.records[0].operands[0]
    x /= x.abs().amax((0, 2, 3), keepdim=True)  # equal ranges
    problem.records[0].output = problem.output(x, problem.W).detach()
    one, many = (solved(problem, channelwise=each) for each in (False, True))
    assert torch.allclose(many.input.scale, one.input.scale.expand(6, 1))
    assert torch.allclose(problem.quantized(one, x), problem.quantized(many, x), atol=1e-12)


@pytest.mark.parametrize("groups", [6, 2, 1])
def test_channels_of_unlike_ranges_lose_less_with_a_grid_each(groups: int) -> None:
    problem = convolution(groups, torch.tensor([0.05, 0.1, 0.5, 1.0, 4.0, 20.0]))
    problem.W.div_(problem.W.abs().mean())
    with torch.no_grad():  # each channel matters as much as any other
        problem.module.weight.div_(
            torch.tensor([0.05, 0.1, 0.5, 1.0, 4.0, 20.0])
            .double()
            .view(groups, -1)
            .repeat_interleave(6 // groups, 0)[:, :, None, None]
        )
    problem = MapProblem(problem.module, problem.records, 8, 4)
    x = problem.records[0].operands[0]
    problem.records[0].output = problem.output(x, problem.W).detach()
    one, many = (solved(problem, channelwise=each) for each in (False, True))
    assert many.error < 0.5 * one.error


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("zero_point", [False, True])
def test_a_channel_of_zeros_stays_finite(channelwise: bool, zero_point: bool) -> None:
    problem = convolution(6, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    found = solved(problem, channelwise=channelwise, zero_point=zero_point)
    y = problem.quantized(found, problem.records[0].operands[0])
    assert bool(torch.isfinite(y).all())
    assert float((y - problem.records[0].output).norm()) < 0.3 * float(problem.records[0].output.norm())


@settings(max_examples=15)
@given(seed=seeds, rows=st.sampled_from([1, 3, 6]), columns=st.sampled_from([1, 2, 4]))
def test_no_other_candidate_of_a_step_has_a_smaller_error(seed: int, rows: int, columns: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(8, 6)
    x = torch.randn(10, 8) * torch.rand(8) * 3
    with torch.no_grad():
        output = layer(x)
    problem = MapProblem(layer, [Record((x,), output, torch.randn_like(output))], 3, 3)
    first = problem.start(
        problem.first_input(channelwise=False, zero_point=False), channelwise=False, blocks=(rows, columns)
    )
    found = problem.search_weight(first, first, SHORT.factors())
    after = problem.search_input(first, found, SHORT.factors())
    inputs = [problem.rounded_input(x, first.input, channelwise=False)]

    def of_weight(steps: Tensor) -> Tensor:
        return problem.errors(inputs, problem.rounded_weight(problem.W, steps)).view(rows, -1).mean(1)

    matrix, scale = problem.rounded_weight(problem.W, found.weight), first.input.scale
    for factor in SHORT.factors():
        trial = found.weight.clone()
        trial[:, -1] = factor * first.weight[:, -1]  # the others are as they were when the last part was searched
        assert bool((of_weight(found.weight) <= of_weight(trial) * (1 + 1e-5)).all())
        grid = type(first.input)(factor * scale, first.input.zero, 3)
        worse = problem.errors([problem.rounded_input(x, grid, channelwise=False)], matrix).mean()
        assert after.error <= float(worse) * (1 + 1e-5)


def test_of_equal_candidates_the_first_is_taken() -> None:
    one = torch.ones(2, 1)
    steps, least = best_steps(one, one, lambda steps: torch.ones(2), [0.5, 0.25, 1.0])
    assert torch.equal(steps, 0.5 * one)
    assert torch.equal(least, torch.ones(2))


@given(seed=seeds, offset=st.floats(-20, 20))
def test_zero_points_are_codes_and_the_overflowing_are_counted(seed: int, offset: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, 30) + offset
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    grid = asymmetric(low, high, 4)
    assert bool(((grid.zero >= 0) & (grid.zero <= 15)).all())
    assert overflows(low, high) == int(((low > 0) | (high < 0)).sum())
    assert bool(((grid.round(x) - x).abs() <= grid.scale * 1.01).all())


def test_a_zero_point_is_chosen_for_one_sided_inputs_and_none_for_others() -> None:
    def chosen(x: Tensor) -> str:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3)
        part = WatchedMap(layer, 4, 4)
        with torch.no_grad():
            part.records = [Record((x,), layer(x), torch.ones_like(layer(x)))]
        method = QHyViT(w_bits=4, a_bits=4)
        return solve(part, "layer", method, bridge=False).grid

    torch.manual_seed(3)
    x = torch.randn(4, 4, 8, 8)
    assert chosen(x.relu()) == "zero point"
    x[0] = x[0].sign() * 3  # as far below 0 as above
    assert chosen(x.clamp(-3, 3) * 7.5 / 3) in ("signed", "zero point")


def order_of_calibration(bridges: str) -> tuple[list[list[str]], dict[str, Tensor], dict[str, Tensor]]:
    """The groups, and each layer's recorded input with all layers before it exact or quantized as they were then."""
    model = small("vit").double()
    samples = [{"image": each["image"].double()} for each in samples_of(model)]
    method = QHyViT(w_bits=3, a_bits=3, bridges=bridges, **QUICK)
    exact = maps_of(model)
    inputs: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, name=n: inputs.__setitem__(name, a[0])) for n, m in exact.items()
    ]
    logits(model, samples)
    for handle in handles:
        handle.remove()
    batch = {"image": torch.cat([each["image"] for each in samples])}
    plan = prepare(model, method, samples[0], Work(samples, lambda name: True, lambda *_: None))
    groups, seen = list(plan.groups(3)), {}
    for group in groups:
        watch(model, [plan.parts[name] for name in group], [(batch, logits(model, samples))], "fisher")
        for name in group:
            part = plan.parts[name]
            if isinstance(part, WatchedMap):
                seen[name] = part.records[0].operands[0]
            with torch.no_grad():
                solve(part, name, method, bridge=name in plan.seen)
    return groups, inputs, seen


def test_with_no_bridges_every_layer_sees_exact_inputs() -> None:
    groups, exact, seen = order_of_calibration("none")
    assert len(groups) == 1
    assert all(torch.allclose(seen[name], exact[name], atol=1e-10) for name in seen)


def test_with_all_for_bridges_every_layer_sees_the_error_of_those_before() -> None:
    groups, exact, seen = order_of_calibration("all")
    assert all(len(group) == 1 for group in groups)
    first, *later = seen
    assert torch.allclose(seen[first], exact[first])
    assert all(not torch.allclose(seen[name], exact[name], rtol=1e-3) for name in later)


def test_the_expected_squared_gradient_is_the_hessian_of_the_divergence() -> None:
    exact = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    random, total = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.float64)
    for _ in range(3000):
        found = exact.clone().requires_grad_()
        loss_of(found, exact, "fisher", random).backward()
        total += found.grad[0].square() / 3000
    p = exact.softmax(-1)[0]
    assert torch.allclose(total, p * (1 - p), atol=0.01)
    found = exact.clone().requires_grad_()
    loss_of(found, exact, "kl", random).backward()
    assert float(found.grad.abs().max()) < 1e-12  # nothing is quantized yet: no gradient


def test_no_other_power_of_two_splits_softmax_outputs_better() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 16, 16).mul(2).softmax(-1), torch.randn(2, 3, 16, 8)
    problem = ProductProblem([Record((a, b), a @ b, torch.ones(2, 3, 16, 8), torch.matmul)], (6, 8))
    first = ProductGrids((problem.first(0, zero_point=False), problem.first(1, zero_point=False)))
    found = problem.search_split(first)
    errors = {}
    for n in range(20):
        trial = ProductGrids((SplitGrid(torch.tensor(2.0**-n), 6), first.pair[1]))
        errors[2.0**-n] = float(problem.errors(trial).mean())
    assert float(found.pair[0].scale) == min(errors, key=lambda split: errors[split])
    assert found.error < errors[1.0]


def test_a_gelu_is_told_from_a_silu() -> None:
    assert looks_like_gelu(torch.tensor(-0.1699), torch.tensor(3.0))
    assert not looks_like_gelu(torch.tensor(-0.27), torch.tensor(3.0))
    assert not looks_like_gelu(torch.tensor(-0.01), torch.tensor(0.02))


AS_PUBLISHED = {"choose_grid": False, "twin": True, "hessian": "kl"}


@pytest.mark.parametrize(
    ("system", "options"),
    [
        pytest.param("mobilevit", {}, marks=pytest.mark.slow),
        *((system, {}) for system in ("mobilevitv2", "efficientformer", "vit")),
        pytest.param("efficientformerv2", {}, marks=pytest.mark.slow),
        *((system, AS_PUBLISHED) for system in [*HYBRIDS, "vit"]),
    ],
)
def test_saved_and_loaded_the_outputs_are_equal(system: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(system)
    samples = samples_of(model, 2)
    result = tersor.compress(model, QHyViT(w_bits=6, a_bits=8, **QUICK, **options), calibration=samples)
    loaded = tersor.load(result.save(tmp_path / "model"), device="cpu")
    assert torch.equal(logits(loaded, samples), logits(result.model, samples))
    assert not torch.equal(logits(loaded, samples), logits(model, samples))
    left = [name for name, each in result.model.named_modules() if type(each) in (nn.Linear, nn.Conv2d)]
    assert not left
    rows = {row.name: row for row in result.summary.layers}
    assert any(row.bridge for row in rows.values())
    assert {row.bits for name, row in rows.items() if name.startswith(("stem", "patch_embed"))} >= {"W6A8"}
    assert any(isinstance(each, QuantizedMap) for each in loaded.modules())
    multiplies = system != "mobilevitv2"
    assert multiplies == any(isinstance(each, QuantizedProducts) for each in loaded.modules())


def test_eight_bits_change_little_and_fewer_change_more() -> None:
    model = small("efficientformer")
    samples = samples_of(model, 3)
    before = logits(model, samples)

    def change(bits: int) -> float:
        result = tersor.compress(
            model, QHyViT(w_bits=bits, a_bits=bits, num_candidates=20, rounds=1), calibration=samples
        )
        return float((logits(result.model, samples) - before).norm() / before.norm())

    assert change(8) < 0.05
    assert change(8) < change(4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"w_bits": 1}, "w_bits=1 is not allowed: 2 to 8"),
        ({"bridges": "some"}, "bridges='some' is not allowed: one of auto, all, none"),
        ({"hessian": "exact"}, "hessian='exact' is not allowed: one of fisher, kl"),
        ({"rounds": 0}, "rounds=0 is not allowed: 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(TersorError, match=line):
        QHyViT(**options)


def test_a_model_without_attention_is_refused_and_says_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    samples = [torch.randn(1, 3, 6, 6)]
    with pytest.raises(TersorError, match="finds no attention in Sequential, so it has no bridges; --bridges none"):
        tersor.compress(model, QHyViT(), calibration=samples)
    result = tersor.compress(model, QHyViT(bridges="none", **QUICK), calibration=samples)
    assert isinstance(result.model[3], QuantizedMap)
    with pytest.raises(TersorError, match="finds no linear layer, convolution or product of activations"):
        tersor.compress(nn.Sequential(nn.LayerNorm(4)), QHyViT(), calibration=[torch.randn(2, 4)])


def test_the_command_line_has_its_options(tersor_command: Callable[..., Any], tmp_path: Path) -> None:
    refused = tersor_command(
        "compress", "demo-vit", "--method", "q-hyvit", "--bridges", "most", "--out", tmp_path / "no"
    )
    assert refused.status == 2
    assert "bridges='most' is not allowed: one of auto, all, none" in refused.err
    assert not (tmp_path / "no").exists()
