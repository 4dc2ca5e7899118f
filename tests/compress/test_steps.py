"""Recipes of several steps: each works on the result of the last, on disk and in memory, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import nn

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.compress import Recipe, from_options
from tersor.compress.recipe import make_rules

STEPS = """
steps:
  - {method: ats, ats_blocks: 2-}
  - {method: rtn, bits: 4, group_size: -1, rules: [{match: "*.mlp.*", bits: 8}]}
"""


@pytest.fixture
def images() -> list[dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    return [{"image": torch.randn(1, 3, 32, 32, generator=drawn)} for _ in range(2)]


def test_dropping_tokens_then_gptq_is_one_job(tmp_path: Path, images: list[dict[str, torch.Tensor]]) -> None:
    steps = [from_options("ats", {"ats_blocks": "3-"}), GPTQ(bits=4, group_size=-1)]
    done = tersor.compress("demo-vit", steps, calibration=images, out=tmp_path / "both", exclude=["*.mlp.fc1"])
    assert [step["name"] for step in done.summary.steps] == ["ats", "gptq"]
    assert done.summary.model == "demo-vit"
    assert json.loads((tmp_path / "both" / "config.json").read_text())["tersor_steps"] == done.summary.steps
    assert [path.name for path in tmp_path.iterdir()] == ["both"]

    apart = tersor.compress("demo-vit", steps[0], calibration=images, out=tmp_path / "one", exclude=["*.mlp.fc1"])
    last = tersor.compress(apart.directory, steps[1], calibration=images, out=tmp_path / "two", exclude=["*.mlp.fc1"])
    expected = tersor.load(last.directory)(**images[0])
    torch.testing.assert_close(tersor.load(tmp_path / "both")(**images[0]), expected, rtol=0, atol=0)
    original = tersor.load("demo-vit")(**images[0])
    lost = (
        original.double().softmax(-1) * (original.double().log_softmax(-1) - expected.double().log_softmax(-1))
    ).sum()
    assert done.summary.divergence == pytest.approx(
        float(lost), rel=1e-3
    )  # from the original, not from the step before


def test_in_memory_gives_what_the_files_give(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 64)), nn.Sequential(nn.Linear(64, 32)))
    steps = [from_options("greenformers", {"rank": 0.5}), RTN(bits=8, group_size=-1)]
    found = tersor.compress(model, steps, format=None)
    factored = tersor.compress(model, steps[0])
    expected = tersor.compress(factored.model, steps[1], format=None)
    x = torch.randn(3, 32)
    torch.testing.assert_close(found.model(x), expected.model(x), rtol=0, atol=0)
    assert len(found.summary.layers) == len(factored.summary.layers) + len(expected.summary.layers)


def test_a_job_goes_on_with_the_step_that_it_had_reached(
    tmp_path: Path, images: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [from_options("ats", {}), GPTQ(bits=4, group_size=-1)]
    job: dict[str, Any] = {"calibration": images, "exclude": ["*.mlp.fc1"]}
    whole = tersor.compress("demo-vit", steps, out=tmp_path / "whole", **job)

    class StoppedError(Exception):
        pass

    solved: list[str] = []
    original = GPTQ.compress_block

    def stopping(self: GPTQ, block: Any) -> None:
        if len(solved) == 2:
            raise StoppedError
        solved.extend([block.name] if block.name else [])  # a forecast solves blocks without a name
        original(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "compress_block", stopping)
        with pytest.raises(StoppedError):
            tersor.compress("demo-vit", steps, out=tmp_path / "out", **job)
    with pytest.raises(TersorError, match="holds unfinished steps of a job with another steps"):
        tersor.compress("demo-vit", [steps[0], GPTQ(bits=3)], out=tmp_path / "out", **job)
    first = tmp_path / ".tersor-steps-out" / "1" / "model.safetensors"
    stamp = first.stat().st_mtime_ns
    lines: list[str] = []
    resumed = tersor.compress(
        "demo-vit", steps, out=tmp_path / "out", progress=lambda what, *_: lines.append(what), **job
    )
    assert resumed.summary.resumed_blocks == 2
    assert not first.exists()
    assert stamp
    assert "step 2 of 2: gptq" in lines
    assert "step 1 of 2: ats" not in lines
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.summary.divergence == whole.summary.divergence


def test_the_command_takes_a_file_of_steps(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text(STEPS)
    ran = tersor_command("compress", "recipe", tmp_path / "steps.yaml", "demo-vit", "--out", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert [step["name"] for step in said["steps"]] == ["ats", "rtn"]
    bits = {row["name"].split(".")[2]: row["bits"] for row in said["layers"] if "bits" in row}
    assert bits == {"attn": 4, "mlp": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: [{method: gptq}, {method: ats}]", "step 1, gptq, packs the weights, which no later step can change"),
        ("steps: [{method: ats}, {bits: 4}]", "step 2 names no method"),
        ("steps: [{method: ats, bits: 4}]", "step 1: method ats has no option 'bits'"),
        ("{steps: [{method: ats}], bits: 4}", "'bits' stands beside `steps`"),
        ("steps: 4", "steps is no list of methods but 4"),
    ],
)
def test_bad_steps_are_one_line(tersor_command: Callable[..., Ran], tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    ran = tersor_command("compress", "recipe", tmp_path / "bad.yaml", "demo-vit", "--out", tmp_path / "out")
    assert ran.status == 2
    assert expected in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".tersor-steps-out").mkdir()
    (tmp_path / ".tersor-steps-out" / "notes.txt").write_text("mine")
    with pytest.raises(TersorError, match="exists and was not made by tersor"):
        tersor.compress("demo-vit", [from_options("ats", {}), RTN()], out=tmp_path / "out", overwrite=True)
    assert (tmp_path / ".tersor-steps-out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"smaples": 3}, "did you mean 'samples'?"),
        ({"include": "*.mlp"}, "is no list of patterns"),
    ],
)
def test_settings_that_are_no_settings_are_named(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(TersorError, match=expected.replace("?", r"\?").replace("*", r"\*")):
        tersor.compress(nn.Sequential(nn.Linear(8, 8)), RTN(), **settings)


def test_rules_go_with_a_step(images: list[dict[str, torch.Tensor]]) -> None:
    steps = [from_options("ats", {}), Recipe(RTN(bits=4, group_size=-1), make_rules([{"match": "*.mlp.*", "bits": 8}]))]
    found = tersor.compress("demo-vit", steps)
    rows = [layer.row() for layer in found.summary.layers]
    assert {row["bits"] for row in rows if ".mlp." in row["name"]} == {8}
    with pytest.raises(TersorError, match="rules belong to one method"):
        tersor.compress("demo-vit", steps, rules=[{"match": "*", "bits": 8}])


def test_images_that_changed_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    from tersor.checkpoint.source import open_checkpoint
    from tersor.compress.settings import settings_of
    from tersor.compress.steps import asked_for

    (tmp_path / "images" / "cat").mkdir(parents=True)
    picture = tmp_path / "images" / "cat" / "0.png"
    picture.write_bytes(b"one")
    steps, asked = [Recipe(from_options("ats", {}))], settings_of({"calibration": str(tmp_path / "images")})
    before = asked_for(open_checkpoint("demo-vit"), steps, asked)
    assert before == asked_for(open_checkpoint("demo-vit"), steps, asked)
    picture.write_bytes(b"another")
    assert before != asked_for(open_checkpoint("demo-vit"), steps, asked)


def test_what_is_refused_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    steps = [from_options("greenformers", {"rank": 0.5}), RTN(bits=8, group_size=-1)]
    with pytest.raises(TersorError, match="matches none of the"):
        tersor.compress("demo-vit", steps, out=tmp_path / "out", include=["*.mlpp.*"])
    done = tersor.compress("demo-vit", steps, out=tmp_path / "out", include=["*.mlp.fc1*"])
    assert done.directory == tmp_path / "out"


def test_a_result_between_the_steps_is_no_input_of_the_same_job(tmp_path: Path) -> None:
    between = tmp_path / ".tersor-steps-out" / "1"
    tersor.compress("demo-vit", from_options("ats", {}), out=between)
    with pytest.raises(TersorError, match="which this job uses"):
        tersor.compress(between, [from_options("greenformers", {}), RTN()], out=tmp_path / "out", overwrite=True)
    assert (between / "config.json").exists()


def test_redo_is_for_one_method(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="redo works on the result of one method"):
        tersor.compress("demo-vit", [from_options("ats", {}), RTN()], redo=["*"], out=tmp_path / "out")
