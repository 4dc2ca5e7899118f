"""Graph transformers with fewer nodes, heads, layers and weights: what each axis does, and results that load equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tersor
import tersor.models
from tersor.layers.pruned_graph_attention import PrunedGraphAttention, kept_nodes
from tersor.methods.structure import gtsp_schedule as schedule
from tersor.methods.structure.gtsp import GTSP, attention_operations, layer_operations, with_heads

SMALL: dict[str, Any] = {
    "node_encoder": "LinearNode",
    "edge_encoder": "LinearEdge",
    "dim_in": 6,
    "dim_edge": 3,
    "layers": 3,
    "dim_hidden": 16,
    "attn_dropout": 0.1,
    "dim_out": 1,
}


def graph_model(**other: Any) -> Any:
    torch.manual_seed(0)
    model = tersor.models.create("graphgps", **{**SMALL, **other}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter.normal_(std=0.3)
    return model


def graphs(model: Any, batches: int = 3, size: int = 4) -> list[dict[str, Tensor]]:
    """Rings whose target is the mean of a feature."""
    torch.manual_seed(1)
    found = []
    for _ in range(batches):
        inputs = model.example_inputs(size)
        sums = torch.zeros(size).index_add(0, inputs["batch"], inputs["x"][:, 0])
        found.append({**inputs, "target": sums / inputs["batch"].bincount()})
    return found


def pruned(model: Any, **options: Any) -> Any:
    method = GTSP(**{"epochs": 4, "update_frequency": 2, **options})
    return tersor.compress(model, method, calibration=graphs(model), format=None)


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**{name: value for name, value in batch.items() if name != "target"})
    return output


def attention(**other: Any) -> PrunedGraphAttention:
    torch.manual_seed(0)
    return PrunedGraphAttention(16, 4, 4, **other).eval()


def padded(sizes: tuple[int, ...] = (5, 9, 2)) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(2)
    real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return torch.randn(*real.shape, 16, generator=chance) * real[..., None], real


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0.5},
        {"tokens": 0.5, "published_tokens": True},
        {"heads": 0.5},
        {"attention_layers": 0.4},
        {"weights": 0.3},
        {"weights": 0.5, "schedule": "dst", "drop_path": 0.5},
        {"tokens": 0.5, "heads": 0.25, "attention_layers": 0.7, "weights": 0.5, "schedule": "gmp"},
    ],
)
def test_results_are_saved_and_loaded_equal(options: dict[str, Any], tmp_path: Path) -> None:
    model = graph_model()
    result = pruned(model, **options)
    result.save(tmp_path / "small")
    loaded = tersor.load(tmp_path / "small")
    batch = graphs(model)[0]
    torch.manual_seed(3)  # of the noise that published_tokens draws while predicting
    expected = run(result.model, batch)
    torch.manual_seed(3)
    assert torch.equal(run(loaded, batch), expected)
    assert torch.isfinite(expected).all()
    rows = [report.row() for report in result.summary.layers]
    assert min(row["operations"] for row in rows) < 1 or "published_tokens" in options
    for row in rows:
        assert row["heads"] in ({0: (1, 2, 4), 1: (0, 1, 2, 4)}["attention_layers" in options])


def test_the_pruned_model_learns_its_task() -> None:
    model = graph_model()
    batches = graphs(model)
    method = GTSP(tokens=0.5, heads=0.5, epochs=20, update_frequency=40, lr=1e-2)
    result = tersor.compress(model, method, calibration=batches, format=None)
    errors = [
        float((run(m, b).flatten() - b["target"]).abs().mean()) for m in (model, result.model) for b in batches[:2]
    ]
    assert sum(errors[2:]) < 0.6 * sum(errors[:2])


def test_a_pruned_model_can_be_pruned_further() -> None:
    model = graph_model()
    first = pruned(model, tokens=0.5, attention_layers=0.7, epochs=1)
    again = pruned(first.model, heads=0.5, epochs=1, update_frequency=1)
    rows = {report.row()["name"]: report.row() for report in again.summary.layers}
    left = [report.row() for report in first.summary.layers if report.row()["heads"]]
    assert {row["name"] for row in left} == set(rows)
    assert all((row["heads"], row["tokens"]) == (2, 0.5) for row in rows.values())
    same = pruned(first.model, epochs=0)
    batch = graphs(model)[0]
    torch.testing.assert_close(run(same.model, batch), run(first.model, batch))


def test_layers_that_lose_attention_have_none() -> None:
    result = pruned(graph_model(), attention_layers=0.0)
    assert [report.row()["heads"] for report in result.summary.layers] == [0, 0, 0]
    assert not any("in_proj" in name for name, _ in result.model.named_parameters())
    kept = pruned(graph_model(), attention_layers=0.3)  # one of three
    assert sorted(report.row()["heads"] for report in kept.summary.layers) == [0, 0, 4]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_ratio_one_is_the_base_layer(masked: bool) -> None:
    model = graph_model()
    result = pruned(model, epochs=0, published_tokens=masked)
    batch = graphs(model)[0]
    torch.testing.assert_close(run(result.model, batch), run(model, batch))
    scored, plain = attention(token_ratio=1 - 1e-9, masked=masked), attention()  # keeps all, by their scores
    plain.load_state_dict(scored.state_dict(), strict=False)
    x, real = padded((9, 9, 9))
    scored.choose_tokens(x, real)
    if not masked:
        torch.testing.assert_close(scored(x, real), plain(x, real))


def test_masks_pass_the_gradient_of_softmax_straight_through() -> None:
    layer = attention(token_ratio=0.5, masked=True)
    assert layer.score is not None
    x, _ = padded()
    noise, weight = torch.rand(3, 9) + 0.1, torch.randn(3, 9, 16)
    (layer.mask_tokens(x, noise) * weight).sum().backward()
    found = layer.score.weight.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    y = (layer.score(x).squeeze(-1).log_softmax(-1) - noise.log()).softmax(-1)
    ((x * y[..., None]) * weight)[:, :-1].sum().backward()  # the last column is kept whatever its score
    assert float(found.norm()) > 0
    torch.testing.assert_close(found, layer.score.weight.grad)


def test_chosen_nodes_teach_their_scores() -> None:
    layer = attention(token_ratio=0.5).train()
    layer(*padded()).square().sum().backward()
    assert layer.score is not None
    assert layer.score.weight.grad is not None
    assert float(layer.score.weight.grad.norm()) > 0


@torch.no_grad()
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.sampled_from([0.25, 0.5, 0.75]))
def test_a_graph_does_not_depend_on_its_batch_and_keeps_its_share(sizes: list[int], ratio: float) -> None:
    layer = attention(token_ratio=ratio)
    x, real = padded(tuple(sizes))
    together = layer(x, real)
    for n, size in enumerate(sizes):
        alone = layer(x[n : n + 1, :size], real[n : n + 1, :size])
        torch.testing.assert_close(together[n, :size], alone[0], rtol=1e-4, atol=1e-5)
        kept = int((together[n] != 0).any(-1).sum())
        assert kept == int(kept_nodes(torch.tensor([size]), ratio)) == max(1, -int(-size * ratio // 1))


@torch.no_grad()
def test_heads_that_are_taken_out_change_nothing() -> None:
    for ratio in (1.0, 0.5):
        layer = attention(token_ratio=ratio)
        alive = torch.tensor([True, False, False, True])
        layer.in_proj.weight.view(3, 4, -1).mul_(alive[None, :, None])
        smaller = with_heads(layer, alive)
        x, real = padded()
        assert smaller.in_proj.weight.shape == (24, 16)
        torch.testing.assert_close(smaller(x, real)[real], layer(x, real)[real])


@given(st.integers(1, 4), st.integers(0, 1000), st.floats(0, 0.9))
def test_numbers_of_alive_heads_and_weights_are_constant(count: int, seed: int, rate: float) -> None:
    chance = torch.Generator().manual_seed(seed)
    alive = torch.arange(8) < count
    importance, growth = torch.rand(2, 8, generator=chance)
    after = schedule.update_heads(alive, importance, growth, rate)
    assert int(after.sum()) == count
    weight, gradient = torch.randn(2, 9, 11, generator=chance)
    mask = torch.rand(9, 11, generator=chance) < 0.4
    moved = schedule.die_and_grow(weight * mask, gradient, mask, rate)
    assert int(moved.sum()) == int(mask.sum())
    dying = -int(-rate * int(mask.sum()) // 1)
    gone = mask & ~moved
    assert int(gone.sum()) <= dying
    if gone.any() and (mask & moved).any():  # what stays or returns is larger, or has a larger gradient
        assert float((weight * mask)[gone].abs().max()) <= float((weight * mask)[mask].abs().sort().values[dying - 1])


def test_heads_that_matter_less_die_and_those_with_gradient_return() -> None:
    alive = torch.tensor([True, True, True, False, False])
    importance, growth = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0]), torch.tensor([0.0, 5.0, 0.0, 1.0, 7.0])
    assert schedule.update_heads(alive, importance, growth, 0.3).tolist() == [True, False, True, False, True]
    assert schedule.update_heads(alive, importance, growth, 0.6).tolist() == [True, True, False, False, True]


def test_density_follows_the_cubic_curve_within_a_weight_per_tensor() -> None:
    curve = schedule.Curve(1.0, 0.25, start=100, end=800, frequency=20)
    assert [curve.density(step) for step in (99, 110, 800)] == [None, None, None]
    weights = {"a": torch.randn(30, 20), "b": torch.randn(40, 10)}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for step in range(100, 800, 20):
        u = (step - 100) / 700
        expected = 0.25 + 0.75 * (1 - u) ** 3
        assert curve.density(step) == pytest.approx(expected)
        masks, grown = schedule.update_weights(weights, {}, masks, way="gmp", density=curve.density(step), rate=0.5)
        assert grown is masks
        assert abs(sum(int(m.sum()) for m in masks.values()) - 1000 * expected) <= 2
    uniform = schedule.prune_uniformly({"a": torch.randn(30, 20), "b": torch.randn(40, 10)}, 0.3)
    assert [int(mask.sum()) for mask in uniform.values()] == [180, 120]


def test_weights_reach_their_density_and_regrown_ones_start_at_zero() -> None:
    result = pruned(graph_model(), weights=0.4, epochs=14, update_frequency=1)
    density = [report.row()["density"] for report in result.summary.layers]
    assert sum(density) / 3 == pytest.approx(0.4, abs=0.06)
    weight, gradient = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 5.0]])
    masks = {"w": torch.ones(1, 4, dtype=torch.bool)}
    _, grown = schedule.update_weights({"w": weight}, {"w": gradient}, masks, way="dst", density=None, rate=0.25)
    assert grown["w"].all()
    assert weight.tolist() == [[4.0, 3.0, 2.0, 1.0]]  # the one that died came back as it was the only candidate
    half = {"w": torch.tensor([[True, True, True, False]])}
    weight[0, 3] = 0
    _, grown = schedule.update_weights({"w": weight}, {"w": gradient}, half, way="dst", density=None, rate=0.3)
    assert grown["w"].tolist() == [[True, True, False, True]]
    assert weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]


def test_drop_path_keeps_the_expectation() -> None:
    layer = attention(drop_path=0.5)
    x, real = padded()
    plain = layer(x, real).detach()
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mean = sum(layer(x, real) for _ in range(1000)) / 1000
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(mean, plain, rtol=0.2, atol=0.05 * float(plain.abs().max()))


def test_operations_are_those_that_torch_counts() -> None:
    for ratio in (1.0, 0.5):
        layer = attention(token_ratio=ratio)
        x, real = padded((8, 8))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            layer(x, real)
        assert attention_operations(layer, real.sum(-1)) == counter.get_total_flops()
    model = graph_model()
    batches = graphs(model)
    full = sum(layer_operations(model, batches).values())
    assert sum(layer_operations(pruned(model, attention_layers=0.0, epochs=0).model, batches).values()) < 0.8 * full


def test_without_targets_it_learns_from_the_original() -> None:
    model = graph_model()
    batches = [{k: v for k, v in batch.items() if k != "target"} for batch in graphs(model)]
    result: Any = tersor.compress(
        model, GTSP(heads=0.5, epochs=2, update_frequency=3), calibration=batches, format=None
    )
    assert result.summary.layers[0].row()["heads"] == 2


def test_what_cannot_be_done_is_refused() -> None:
    model = graph_model()
    for options, message in (
        ({"tokens": 0.0}, "tokens=0.0 is not allowed: above 0, at most 1"),
        ({"weights": 1.5}, "weights=1.5 is not allowed"),
        ({"schedule": "snip"}, "schedule='snip' is not allowed: one of granet"),
    ):
        with pytest.raises(tersor.TersorError, match=message):
            GTSP(**options)
    with pytest.raises(
        tersor.TersorError, match=r"weights=0\.5 cannot be reached: 2 epochs of 3 batches have 0 updates"
    ):
        pruned(model, weights=0.5, epochs=2, update_frequency=200)
    with pytest.raises(tersor.TersorError, match="is no graph transformer"):
        tersor.compress(torch.nn.Linear(2, 2), GTSP(), calibration=[torch.zeros(1, 2)], format=None)
    with pytest.raises(tersor.TersorError, match=r"layers\.0 has no attention that gtsp prunes \(Performer\)"):
        pruned(graph_model(layer_type="GINE+Performer"), heads=0.5)
    wrong = [{**batch, "target": torch.zeros(3)} for batch in graphs(model)]
    with pytest.raises(tersor.TersorError, match=r"the target of sample 0 is \[3\], the model gives \[4, 1\]"):
        tersor.compress(model, GTSP(heads=0.5, epochs=1, update_frequency=1), calibration=wrong, format=None)
