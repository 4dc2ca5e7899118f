"""The output factor: GPTQ's result where outputs are alike, a lower loss where they are not, and the statistics it rests on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Stopped, files_of
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, TersorError
from tersor.calibrate.output_hessians import gather_output_hessians
from tersor.compress import outputs
from tersor.formats.grid import Grid, fit_grid
from tersor.methods.block import Block
from tersor.methods.weights.gptq_solver import factorize, factorize_outputs, solve_factorized
from tersor.progress import silent

SMALL = GPTQ(bits=3, group_size=16, desc_act=True, static_groups=True)


@dataclass(frozen=True)
class Problem:
    W: Tensor
    H_I: Tensor
    H_O: Tensor

    def loss(self, Q: Tensor) -> float:
        E = self.W - Q
        return float((self.H_O @ E @ self.H_I @ E.t()).trace())


def problem(seed: int, rows: int, columns: int) -> Problem:
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    X, G = normal(columns, columns) @ normal(columns, 2 * columns), normal(rows, rows) @ normal(rows, 2 * rows)
    return Problem(normal(rows, columns), X @ X.t(), G @ G.t())


GRIDS: list[dict[str, Any]] = [
    {"bits": 3, "group_size": -1, "sym": False},
    {"bits": 2, "group_size": 32, "sym": True, "static_groups": True},
    {"bits": "ternary", "group_size": 16, "sym": True},
]


@pytest.mark.parametrize("how", GRIDS)
def test_with_outputs_that_are_alike_the_result_is_gptqs_bit_for_bit(how: dict[str, Any]) -> None:
    given = problem(0, 150, 170)  # more than a tile in both directions
    W, factor = given.W.float(), factorize(given.H_I.float(), desc_act=True)
    plain = solve_factorized(W, factor, **how)
    found = solve_factorized(W, factor, output=factorize_outputs(3e-4 * torch.eye(150)), **how)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.zeros, plain.zeros)


@pytest.mark.parametrize("how", GRIDS)
def test_errors_that_matter_together_become_less(how: dict[str, Any]) -> None:
    given = problem(1, 150, 170)
    factor = factorize(given.H_I, desc_act=True)
    plain = solve_factorized(given.W, factor, **how)
    found = solve_factorized(given.W, factor, output=factorize_outputs(given.H_O), **how)
    assert given.loss(found.dequantize()) < 0.7 * given.loss(plain.dequantize())


def test_each_row_is_gptqs_solution_of_a_weight_that_the_rows_before_it_moved() -> None:
    given = problem(2, 140, 40)
    grid, factor, output = fit_grid(given.W, 3, sym=False), factorize(given.H_I), factorize_outputs(given.H_O)
    E = torch.zeros_like(given.W)
    codes = torch.empty(140, 40, dtype=torch.uint8)
    for place, row in enumerate(output.order.tolist()):
        moved = given.W[row] + output.L[:place, place] @ E[output.order[:place]]
        mine = Grid(grid.scale[row : row + 1], grid.zero[row : row + 1], 3)
        solved = solve_factorized(moved[None], factor, bits=3, grid=mine)
        codes[row], E[row] = solved.codes[0], given.W[row] - solved.dequantize()[0]
    found = solve_factorized(given.W, factor, bits=3, output=output)
    assert torch.equal(found.codes, codes)


def test_the_error_that_is_told_is_the_damped_loss() -> None:
    given = problem(3, 30, 40)
    found = solve_factorized(
        given.W, factorize(given.H_I, damp=0.02), bits=3, output=factorize_outputs(given.H_O, damp=0.05)
    )
    H_I, H_O = (
        H + damp * H.diagonal().mean() * torch.eye(len(H)) for H, damp in ((given.H_I, 0.02), (given.H_O, 0.05))
    )
    R = factorize(H_O[found_order(given.H_O)][:, found_order(given.H_O)], damp=1e-12).R
    exact = replace(given, H_I=H_I, H_O=H_O).loss(found.dequantize())
    assert found.error == pytest.approx(exact / 2 / float(R.diagonal().square().mean()), rel=1e-6)


def found_order(H: Tensor) -> Tensor:
    return torch.argsort(H.diagonal(), descending=True)


class Head(nn.Module):
    def __init__(self, *, predicts: bool) -> None:
        super().__init__()
        self.layer, self.predicts = nn.Linear(5, 4), predicts

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(x)) if self.predicts else self.layer(x)


def test_the_statistics_are_the_fisher_matrix_of_the_predictions() -> None:
    torch.manual_seed(0)
    model = Head(predicts=True).requires_grad_(False)
    x = torch.randn(1, 40_000, 5)
    found = gather_output_hessians(model, {"layer": model.layer}, [{"x": x}], silent)["layer"]
    p = model.layer(x[0]).softmax(-1)
    exact = torch.diag(p.mean(0)) - p.t() @ p / len(p)
    torch.testing.assert_close(found, exact / exact.diagonal().mean(), atol=0.03, rtol=0)


def test_outputs_that_are_no_predictions_count_by_their_squared_error() -> None:
    torch.manual_seed(0)
    model = Head(predicts=False).requires_grad_(False)
    batches = [{"x": torch.randn(1, 20_000, 5)} for _ in range(2)]
    found = gather_output_hessians(model, {"layer": model.layer}, batches, silent)["layer"]
    torch.testing.assert_close(found, torch.eye(4), atol=0.03, rtol=0)


def compressed(name: str, method: GPTQ) -> Any:
    return tersor.compress(build(name), method, calibration=samples(name, 4), format=None)


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_every_layer_of_a_model_takes_part(name: str) -> None:
    plain, found = (compressed(name, replace(SMALL, output_factor=each)) for each in (False, True))
    assert not any(layer.note for layer in found.summary.layers)
    before, after = plain.model.state_dict(), found.model.state_dict()
    packed = [key for key in before if key.endswith("qweight")]
    assert packed
    assert not any(torch.equal(before[key], after[key]) for key in packed)


def test_experts_are_solved_without_and_say_so() -> None:
    layers = compressed("mixtral", replace(SMALL, output_factor=True)).summary.layers
    assert all(("no output factor" in layer.note) == ("experts" in layer.name) for layer in layers)
    assert any("experts" in layer.name for layer in layers)


def test_a_job_that_is_stopped_between_blocks_comes_to_the_same_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(SMALL, group_size=32, output_factor=True)

    def run(out: Path) -> Any:
        return tersor.compress(small_source, method, out=out, samples=2, seq_len=32)

    run(tmp_path / "whole")
    compress_block = GPTQ.compress_block

    def stop_at_second(self: GPTQ, block: Block) -> None:
        if block.name.endswith(".1"):
            raise Stopped
        compress_block(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(GPTQ, "compress_block", stop_at_second)
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    assert run(tmp_path / "out").summary.resumed_blocks == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_model_whose_factors_do_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "memory_total", lambda place: 1 << 16)
    with pytest.raises(
        TersorError, match=r"output_factor holds 0\.0 GiB .* cpu has 0\.0 GiB: leave it out, or choose fewer"
    ):
        compressed("llama", replace(SMALL, output_factor=True))


def test_refits_beside_it_are_refused() -> None:
    with pytest.raises(TersorError, match="refits works on each row alone"):
        GPTQ(refits=1, output_factor=True)
