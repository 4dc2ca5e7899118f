"""`--method best` and `best-fast`: the steps, what is said before, one flag, and going on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from zoo.tiny_models import build

import tersor
from tersor import TersorError
from tersor.compress.best import best_steps, learns_together, passes
from tersor.methods.training.scales import Scales


def names(name: str, *, together: bool = True, **options: Any) -> list[str]:
    return [step.method.name for step in best_steps(name, options, together=together)]


def test_the_steps_follow_from_the_bits_and_the_memory() -> None:
    assert names("best", bits=3) == ["gptq", "scales"]
    assert names("best", bits=3, together=False) == ["gptq", "rounding", "scales"]
    assert names("best-fast", bits="ternary") == ["gptq", "scales"]
    assert names("best", bits=8) == names("best-fast", bits=8) == ["gptq"]
    assert passes(best_steps("best-fast", {})) < 3 * passes(best_steps("best-fast", {"bits": 8}))
    assert passes(best_steps("best", {})) > 3 * passes(best_steps("best-fast", {}))
    moves = [best_steps("best-fast", {}, together=each)[1].method.options()["integers"] for each in (True, False)]
    assert moves == [True, False]


@pytest.mark.parametrize(("samples", "seq_len", "size"), [(128, 2048, 2), (512, 512, 8), (40, 64, 1), (4, 64, 1)])
def test_a_step_of_learning_takes_about_the_same_number_of_tokens(samples: int, seq_len: int, size: int) -> None:
    learning = best_steps("best", {}, samples=samples, seq_len=seq_len)[1].method
    assert learning.options()["batch_size"] == size


def test_integers_learn_together_where_they_fit_in_memory() -> None:
    billion = 10**9
    assert learns_together(billion, 2 * billion, 32 * billion)
    assert not learns_together(7 * billion, 16 * billion, 80 * billion)
    assert learns_together(7 * billion, 16 * billion, None)  # nobody knows: it is tried


def test_what_best_chooses_itself_is_refused() -> None:
    with pytest.raises(TersorError, match="best chooses mse itself; it takes bits, group_size, sym"):
        best_steps("best", {"mse": True})


def test_one_flag_is_all_that_it_takes(
    tersor_command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", "demo", "--bits", 3, "--samples", 3, "--seq-len", 24, "--out", tmp_path / "out")
    ran = tersor_command(*command, "--method", "best-fast")
    assert ran.status == 0, ran.err
    assert "best-fast: gptq, scales; about" in " ".join((ran.out + ran.err).split())
    steps = json.loads((tmp_path / "out" / "config.json").read_text())["tersor_steps"]
    assert [step["name"] for step in steps] == ["gptq", "scales"]
    for more, said in (
        (("--damp", 0.1), "best chooses damp itself"),
        (("--target-bits", 3.5, "--bits", 3), "--bits does nothing beside --target-bits"),
    ):
        refused = tersor_command("quantize", "demo", "--method", "best", *more, "--out", tmp_path / "no")
        assert refused.status == 2
        assert said in " ".join(refused.err.split())


def test_best_tunes_layers_whose_bits_a_target_chose(tmp_path: Path) -> None:
    build("llama").float().save_pretrained(tmp_path / "model")
    drawn = torch.Generator().manual_seed(0)
    samples = [{"input_ids": torch.randint(0, 96, (1, 16), generator=drawn)} for _ in range(8)]
    job: dict[str, Any] = {"calibration": samples, "target_bits": 4.5}
    steps = best_steps("best-fast", {"group_size": 32})
    chosen = tersor.compress(tmp_path / "model", steps[:1], out=tmp_path / "chosen", **job).summary
    tuned = tersor.compress(tmp_path / "model", steps, out=tmp_path / "tuned", **job).summary
    assert chosen.bits_per_weight == tuned.bits_per_weight <= 4.5
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("chosen", "tuned")]
    assert config[0]["quantization_config"]["dynamic"]  # not all layers got the same
    assert config[0]["quantization_config"]["dynamic"] == config[1]["quantization_config"]["dynamic"]
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("chosen", "tuned")]
    assert saved[0] != saved[1]


def test_best_goes_on_with_the_step_that_it_had_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").float().save_pretrained(tmp_path / "model")
    drawn = torch.Generator().manual_seed(0)
    job: dict[str, Any] = {
        "calibration": [{"input_ids": torch.randint(0, 96, (1, 16), generator=drawn)} for _ in range(8)]
    }
    steps = best_steps("best", {"bits": 2, "group_size": 32}, together=False)
    whole = tersor.compress(tmp_path / "model", steps, out=tmp_path / "whole", **job)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scales, "tune", stopped)
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(tmp_path / "model", steps, out=tmp_path / "out", **job)
    lines: list[str] = []
    tersor.compress(
        tmp_path / "model", steps, out=tmp_path / "out", progress=lambda what, *_: lines.append(what), **job
    )
    assert "step 3 of 3: scales" in lines
    assert "step 2 of 3: rounding" not in lines
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert saved[0] == saved[1]
    assert whole.summary.divergence is not None
