"""Asymmetric calibration: the target is the least-squares one, and both models run side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import Stopped, files_of
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, TersorError
from tersor.calibrate.statistics import watch_inputs
from tersor.layers.linear_map import linear_maps, weight_matrix
from tersor.methods.block import Block, Statistics
from tersor.methods.method import BlockMethod
from tersor.methods.weights.asymmetric import asymmetric_target
from tersor.methods.weights.gptq_solver import factorize, solve_factorized, solve_rtn

SMALL = GPTQ(bits=3, group_size=16, desc_act=True, static_groups=True)


@dataclass(frozen=True)
class Problem:
    """A layer's weight, the original's inputs [columns, tokens], and those that lost layers before it make."""

    W: Tensor
    exact: Tensor
    X: Tensor

    @property
    def H(self) -> Tensor:
        return self.X @ self.X.t()

    @property
    def D(self) -> Tensor:
        return (self.exact - self.X) @ self.X.t()

    def error(self, Q: Tensor) -> float:
        return float((self.W @ self.exact - Q @ self.X).square().sum())


def problem(seed: int, columns: int = 48) -> Problem:
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    exact = normal(columns, columns) @ normal(columns, 400)
    mixed = torch.eye(columns, dtype=torch.float64) + 0.02 * normal(columns, columns)
    return Problem(normal(16, columns), exact, mixed @ exact + 0.1 * normal(columns, 400))


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_target_is_the_damped_least_squares_one(desc_act: bool) -> None:
    given = problem(0)
    found = asymmetric_target(given.W, given.D, factorize(given.H, damp=0.01, desc_act=desc_act), 1.0)
    root = (0.01 * given.H.diagonal().mean()).sqrt() * torch.eye(len(given.X), dtype=torch.float64)
    inputs, outputs = torch.cat([given.X, root], 1), torch.cat([given.W @ given.exact, given.W @ root], 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(inputs.t(), outputs.t()).solution.t())


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bits", [2, 4, "ternary"])
def test_where_inputs_are_equal_the_result_is_gptqs_bit_for_bit(bits: Any, group_size: int) -> None:
    given = problem(1)
    factor = factorize(given.H.float(), desc_act=True)
    W = asymmetric_target(given.W.float(), torch.zeros_like(given.H).float(), factor, 1.0)
    how: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": True, "static_groups": True}
    plain, asymmetric = (solve_factorized(each, factor, **how) for each in (given.W.float(), W))
    assert torch.equal(plain.codes, asymmetric.codes)
    assert torch.equal(plain.scales, asymmetric.scales)


@pytest.mark.parametrize("seed", range(5))
def test_the_more_of_the_target_the_closer_to_the_originals_outputs(seed: int) -> None:
    given = problem(seed)
    factor = factorize(given.H)
    how: dict[str, Any] = {"bits": 4, "group_size": 16, "sym": True}
    targets = [asymmetric_target(given.W, given.D, factor, share) for share in (0.0, 0.5, 1.0)]
    plain, half, whole = (given.error(solve_factorized(each, factor, **how).dequantize()) for each in targets)
    assert whole < half < plain < given.error(solve_rtn(given.W, **how).dequantize())


def compressed(method: GPTQ, name: str = "llama", **settings: Any) -> Any:
    model = build(name)
    return tersor.compress(model, method, calibration=samples(name, 4), format=None, **settings)


def integers(result: Any) -> dict[str, Tensor]:
    return {name: value for name, value in result.model.state_dict().items() if value.dtype == torch.int32}


def test_layers_that_nothing_was_lost_before_are_solved_as_gptq_does() -> None:
    plain, asymmetric = (integers(compressed(replace(SMALL, asymmetric=share))) for share in (0.0, 1.0))
    first = [f"model.layers.0.self_attn.{each}_proj.qweight" for each in "qkv"]
    assert all(torch.equal(plain[name], asymmetric[name]) for name in first)
    others = [name for name in plain if name.endswith("qweight") and name not in first]
    assert not any(torch.equal(plain[name], asymmetric[name]) for name in others)


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "mamba", "albert"])
def test_models_of_any_kind_come_closer_to_their_original_on_the_samples(name: str) -> None:
    losses = []
    for share in (0.0, 1.0):
        model, batches = build(name), samples(name, 4)
        result = compressed(replace(SMALL, asymmetric=share), name)
        with torch.no_grad():
            pairs = [(result.model(**each).logits, model(**each).logits) for each in batches]
        losses.append(sum(float((found - wanted).square().sum()) for found, wanted in pairs))
    assert losses[1] < losses[0]


def test_experts_are_solved_without_and_say_so() -> None:
    layers = compressed(replace(SMALL, asymmetric=1.0), "mixtral").summary.layers
    assert all(("not asymmetric" in each.note) == ("experts" in each.name) for each in layers if each.tokens)
    assert any("experts" in each.name for each in layers)


@dataclass(frozen=True, eq=False)
class Recording(BlockMethod):
    """Halves every weight, and keeps what the calibration said."""

    name: ClassVar[str] = "recording"
    seen: Any = None

    @property
    def compares(self) -> bool:
        return True

    def compress_block(self, block: Block) -> None:
        for names in block.order.groups:
            for statistics in block.hessians(names):
                self.seen.update(statistics)
                block.solve(lambda name: (_halved(block, name), ""), statistics)


def _halved(block: Block, name: str) -> Any:
    return solve_rtn(weight_matrix(block.linears[name]) / 2, bits=8)


def inputs_of(model: nn.Module, batches: list[dict[str, Tensor]], names: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    maps = {name: each for name, each in linear_maps(model).items() if name in names}
    with torch.no_grad(), watch_inputs(maps, lambda name, x: found[name].append(x.flatten(0, -2).double())):
        for batch in batches:
            model(**batch)
    return {name: torch.cat(each) for name, each in found.items()}


def test_statistics_are_of_the_two_models_side_by_side() -> None:
    model, batches, seen = build("llama"), samples("llama", 3), {}
    result = tersor.compress(model, Recording(seen=seen), calibration=batches, format=None)
    exact = inputs_of(model, batches, seen)
    changed = build("llama")
    with torch.no_grad():
        for name, each in linear_maps(changed).items():
            if name in seen:
                weight_matrix(each).copy_(_dense(result.model, name))
    found: Statistics
    for name, found in seen.items():
        x = inputs_of(changed, batches, {name: None})[name]
        expected = 2 / 3 * (exact[name] - x).t() @ x
        assert found.deviation is not None
        torch.testing.assert_close(
            found.deviation.double(), expected, rtol=1e-3, atol=1e-3 * float(x.square().sum(0).mean())
        )
    assert float(seen["model.layers.0.self_attn.q_proj"].deviation.abs().max()) == 0


def _dense(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).packed.dequantize(torch.float32)  # type: ignore[no-any-return,operator,union-attr]


def test_a_job_that_is_stopped_between_blocks_comes_to_the_same_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(SMALL, group_size=32, asymmetric=0.5)

    def run(out: Path) -> Any:
        return tersor.compress(small_source, method, out=tmp_path / out, samples=2, seq_len=32)

    def stop_at_second(block: Block) -> None:
        if block.name.endswith(".1"):
            raise Stopped

    run(tmp_path / "whole")
    compress_block: Callable[[GPTQ, Block], None] = GPTQ.compress_block
    with monkeypatch.context() as patched:
        patched.setattr(
            GPTQ, "compress_block", lambda self, block: (stop_at_second(block), compress_block(self, block))
        )
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    assert run(tmp_path / "out").summary.resumed_blocks == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_module_gets_the_numbers_that_its_checkpoint_gets_with_activations_on_disk(tmp_path: Path) -> None:
    method, batches = replace(SMALL, group_size=32, asymmetric=1.0), samples("llama", 2, length=96)
    build("llama").save_pretrained(tmp_path / "model")
    packed = integers(tersor.compress(build("llama"), method, calibration=batches, format="gptq"))
    how: dict[str, Any] = {"calibration": batches, "format": "gptq", "activations": "disk"}
    loaded = integers(tersor.compress(tmp_path / "model", method, out=tmp_path / "out", **how))
    assert packed.keys() == loaded.keys()
    assert all(torch.equal(packed[name], loaded[name]) for name in packed)


def test_a_share_outside_is_refused() -> None:
    with pytest.raises(TersorError, match=r"asymmetric=1\.5 is not allowed: 0 to 1"):
        GPTQ(asymmetric=1.5)
