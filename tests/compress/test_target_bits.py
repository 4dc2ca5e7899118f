"""Bits where they pay: the choice is exact, within the target, and what is written loads elsewhere."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Ran, Stopped, files_of
from torch import nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.compress import target_bits
from tersor.compress.knapsack import choose
from tersor.errors import NotFiniteError
from tersor.formats.layout import UniformGrids
from tersor.formats.layouts import LAYOUTS, write
from tersor.methods.weights.gptq_solver import solve_rtn

BASE = GPTQ(group_size=64, desc_act=True, static_groups=True)


def by_trying(items: list[list[tuple[int, float]]], budget: int) -> float | None:
    """The least cost of all combinations."""
    found = [
        sum(cost for _, cost in each) for each in itertools.product(*items) if sum(size for size, _ in each) <= budget
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    chance = random.Random(seed)
    items = [
        [(chance.randint(1, 30), chance.random()) for _ in range(chance.randint(1, 4))]
        for _ in range(chance.randint(1, 6))
    ]
    budget = chance.randint(1, 100)
    found, expected = choose(items, budget), by_trying(items, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert sum(item[n][0] for item, n in zip(items, found, strict=True)) <= budget
    assert sum(item[n][1] for item, n in zip(items, found, strict=True)) == pytest.approx(expected)


def test_many_layers_are_chosen_exactly_in_little_time() -> None:
    options = [(2 * 10**6 + 5, 0.9), (3 * 10**6 + 5, 0.3), (4 * 10**6 + 5, 0.1), (8 * 10**6 + 5, 0.0)]
    items = [[(size, cost * (1 + n)) for size, cost in options] for n in range(224)]
    found = choose(items, 224 * 3 * 10**6 + 224 * 5)
    assert found is not None
    assert [options[n][0] for n in found] == sorted(options[n][0] for n in found)  # later ones cost more


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("sym", [True, False])
def test_sizes_are_those_that_are_written(bits: int, layout: str, sym: bool) -> None:
    torch.manual_seed(0)
    solution = solve_rtn(torch.randn(64, 96), bits=bits, group_size=32, sym=sym)
    weight = solution.pack(None)
    written = write(weight, LAYOUTS[layout], sym=sym)
    size = {suffix: each.numel() * each.element_size() for suffix, each in written.items()}
    sizes = LAYOUTS[layout].sizes
    assert sizes is not None
    assert sizes(64, 96, UniformGrids(bits, 32, sym), weight.scales.dtype) == size


def compressed(target: float, **settings: Any) -> Any:
    model = build("llama").to(torch.float16 if settings.get("format") else torch.float32).float()
    return tersor.compress(model, BASE, calibration=samples("llama", 6), target_bits=target, **settings)


def test_layers_that_read_one_input_are_chosen_together_within_the_target() -> None:
    found = compressed(4.0)
    bits = {row.name: (row.bits, row.group_size) for row in found.summary.layers}
    assert len(set(bits.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({bits[f"{block}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    assert 3.0 < found.summary.bits_per_weight <= 4.0


def test_more_bits_lose_less() -> None:
    assert compressed(5.0).summary.divergence < compressed(3.5).summary.divergence


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_mixture_is_written_read_back_and_resumed(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    job: dict[str, Any] = {"calibration": samples("llama", 6), "target_bits": 4.0, "format": format}
    done = tersor.compress(tmp_path / "model", BASE, out=tmp_path / "out", **job)
    assert 3.0 < done.summary.bits_per_weight <= 4.0
    dense = tersor.load(tmp_path / "out")
    x = samples("llama", 1)[0]
    expected = dense(**x).logits
    if format == "compressed-tensors":
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(theirs(**x).logits, expected, rtol=1e-3, atol=1e-4)
    record = json.loads((tmp_path / "out" / "tersor.json").read_text())
    assert record["rules"]
    assert "target_bits" not in record["settings"]

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("compressing model.layers.1"):
            raise Stopped

    with pytest.raises(Stopped):
        tersor.compress(tmp_path / "model", BASE, out=tmp_path / "again", progress=stop, **job)
    monkeypatch.setattr(target_bits, "_lost", None)  # nothing is measured from here on
    again = tersor.compress(tmp_path / "model", BASE, out=tmp_path / "again", **job)
    assert again.summary.resumed_blocks == 1
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    with pytest.raises(TersorError, match="holds the finished result of this very command"):
        tersor.compress(tmp_path / "model", BASE, out=tmp_path / "out", **job)


def test_an_image_model_is_measured_by_what_it_returns() -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = tersor.models.create("vit", **small).eval()
    images = [{"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([n % 5, 1])} for n in range(3)]
    found = tersor.compress(model, BASE, calibration=images, target_bits=4.5)
    assert found.summary.bits_per_weight <= 4.5


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (RTN(), {}, "target_bits chooses for gptq, not for rtn"),
        (BASE, {"rules": [{"match": "*.q_proj", "bits": 8}]}, "makes the rules of a job itself"),
        (
            BASE,
            {"target_bits": 2.01},
            r"target_bits=2.01 is below the \d\.\d+ bits a weight that the least choice takes",
        ),
        (BASE, {"target_bits": 12.0}, "target_bits=12.0 is not above 2 and at most 9"),
    ],
)
def test_what_cannot_be_is_one_line(method: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.compress(build("llama"), method, calibration=samples("llama", 4), **{"target_bits": 4.0, **settings})


def test_the_model_in_memory_is_left_alone() -> None:
    model = build("llama")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    tersor.compress(model, BASE, calibration=samples("llama", 4), target_bits=4.0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_command_refuses_two_numbers_of_bits(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("quantize", "demo", "--bits", 3, "--target-bits", 3.25, "--out", tmp_path / "out")
    assert ran.status == 2
    assert "--bits does nothing beside --target-bits" in " ".join(ran.err.split())


def test_skipped_layers_stay(tmp_path: Path) -> None:
    model: nn.Module = build("llama")
    rules = [{"match": "*.q_proj", "skip": True}]
    found = tersor.compress(model, BASE, calibration=samples("llama", 4), target_bits=4.0, rules=rules)
    assert not any("q_proj" in row.name for row in found.summary.layers)


def test_a_cost_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        choose([[(1, math.nan), (2, 0.1), (4, 0.01)]] * 3, 12)


def test_a_candidate_that_overflows_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = target_bits._lost
    monkeypatch.setattr(target_bits, "_lost", lambda *outputs: found if (found := lost(*outputs)) < 0.01 else math.nan)
    items: list[Any] = []
    recipe = target_bits._recipe
    monkeypatch.setattr(target_bits, "_recipe", lambda found, *rest: items.extend(found) or recipe(found, *rest))
    bits = {row.name: (row.bits, row.group_size) for row in compressed(6.0).summary.layers}
    bad = {
        (name, option) for each in items for option, _, cost in each.options if math.isinf(cost) for name in each.names
    }
    assert bad
    assert not bad & set(bits.items())


def test_a_model_that_overflows_is_told() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    with pytest.raises(NotFiniteError, match="not finite"):
        tersor.compress(model, BASE, calibration=samples("llama", 4), target_bits=4.0)


def test_an_encoder_decoder_that_is_given_one_text_is_measured() -> None:
    texts = [{"input_ids": each["input_ids"]} for each in samples("llama", 4)]
    found = tersor.compress(build("t5"), BASE, calibration=texts, target_bits=4.5)
    assert found.summary.bits_per_weight <= 4.5


def test_what_cannot_be_is_told_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    job: dict[str, Any] = {"calibration": samples("llama", 4), "out": tmp_path / "out"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    monkeypatch.setattr(target_bits, "_lost", None)
    with pytest.raises(TersorError, match="exists and is not empty"):
        tersor.compress(tmp_path / "model", BASE, target_bits=4.0, **job)
    (tmp_path / "out" / "mine").unlink()
    with pytest.raises(TersorError, match="the least choice takes"):
        tersor.compress(tmp_path / "model", BASE, target_bits=2.01, **job)


def test_layers_that_the_judges_do_not_call_keep_the_bits_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    together, left = target_bits._together, "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(target_bits, "_together", lambda *given: [n for n in together(*given) if n != [left]])
    found = compressed(3.6).summary
    assert {row.name: row.bits for row in found.layers}[left] == BASE.bits
    assert 3.0 < found.bits_per_weight <= 3.6
