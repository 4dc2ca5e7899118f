"""Attribution with a block of each model in memory: the same figures, and nothing more is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from torch import Tensor, nn

import tersor
from tersor.checkpoint.source import open_checkpoint
from tersor.compress.recipe import Recipe
from tersor.evaluate.streamed import Streamed, Walked, run, walked_measure
from tersor.methods.weights.smoothquant import SmoothQuant
from tersor.tasks.attribution import attribution
from tersor.tasks.compared import Inputs

Command = Callable[..., Ran]
INPUTS = Inputs(seq_len=32, most=2)


@pytest.fixture(scope="module")
def rounded(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "model"
    tersor.compress(small_source, tersor.RTN(bits=2, group_size=32), out=out, device="cpu")
    return out


@pytest.mark.parametrize("by", ["layer", "block"])
def test_figures_are_those_of_models_in_memory(small_source: Path, rounded: Path, by: str) -> None:
    streamed, whole = (
        attribution(rounded, small_source, INPUTS, by=by, bits=None, device="cpu", stream=stream)
        for stream in (True, False)
    )
    assert len(streamed.rows) == len(whole.rows) > 1
    assert streamed.total_kl == pytest.approx(whole.total_kl, rel=1e-4)
    other = {row.name: row for row in whole.rows}
    for row in streamed.rows:
        mine = other[row.name]
        assert (row.kind, row.depth, row.bits, row.members) == (mine.kind, mine.depth, mine.bits, mine.members)
        assert (row.kl, row.restored) == pytest.approx((mine.kl, mine.restored), rel=1e-3, abs=1e-6)


def test_one_block_of_each_is_in_memory(small_source: Path, rounded: Path) -> None:
    model, base = (Walked(open_checkpoint(each), dtype="auto", device="cpu") for each in (rounded, small_source))
    measure = walked_measure(base, ["builtin"], seq_len=32, max_windows=2)
    exchange = Streamed(model, base, measure)
    groups = [part.members for part in exchange.parts() if part.changed]
    assert len(groups) > 2
    seen: list[list[str]] = []

    def note(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        seen.append([name for name in base.units if not _absent(base, name)])

    for each in base.module.modules():
        if isinstance(each, nn.Linear):
            each.register_forward_pre_hook(note)
    outputs = run(base, model, groups, measure, lambda number, found: found)
    assert len(outputs) == len(groups)
    assert max(map(len, seen)) == 1
    assert all(_absent(each, name) for each in (model, base) for name in base.units)
    alone = run(base, model, groups[:1], measure, lambda number, found: found)
    torch.testing.assert_close(outputs[0][0], alone[0][0])  # whatever else runs in the pass


def _absent(walked: Walked, name: str) -> bool:
    return all(parameter.is_meta for parameter in walked.units[name].module.parameters())


def test_the_suggestion_is_measured_too(small_source: Path, rounded: Path, tersor_command: Command) -> None:
    quick = ("--seq-len", 32, "--max-eval-samples", 2, "--device", "cpu", "--num-layers", 2, "--by", "block")
    ran = tersor_command("attribute", rounded, "--against", small_source, *quick, "--stream")
    assert ran.status == 0, ran.err
    assert "8 bits" in ran.out


def test_what_cannot_be_streamed_is_one_line(small_source: Path, tmp_path: Path, tersor_command: Command) -> None:
    smooth = tmp_path / "smooth"
    steps = [Recipe(SmoothQuant(alpha=0.5)), Recipe(tersor.RTN(bits=8, group_size=-1))]
    tersor.compress(small_source, steps, out=smooth, samples=2, seq_len=32, device="cpu")
    for arguments, said in (
        ((smooth, "--against", small_source, "--seq-len", 32), "use --no-stream"),
        ((small_source, "--against", "demo", "--seq-len", 32), "the layers of the two models do not correspond"),
        (("demo-vit", "--against", "demo-vit", "--images", tmp_path), "--stream is for language models"),
    ):
        ran = tersor_command("attribute", *arguments, "--max-eval-samples", 2, "--device", "cpu", "--stream")
        assert ran.status == 2, ran.out
        assert said in ran.err
        assert len(ran.err.strip().splitlines()) == 1
