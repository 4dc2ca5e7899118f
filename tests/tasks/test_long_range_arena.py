"""Every sequence model that can take a task of the Long Range Arena gets it in its own form, by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
import tersor.models
from tersor.cli.main import main
from tersor.errors import TersorError
from tersor.tasks.long_range_arena import prepare, takers
from tersor.train.objectives import answering

FEW = {"train": 4, "validation": 2, "test": 2}
# Of `small`, what follows from the task.
SIZES = ("vocab", "vocab_size", "num_tokens", "d_in", "in_channels", "num_classes", "l_max", "max_len", "seq_len")
LISTOPS = takers("listops")


def small(name: str) -> dict[str, Any]:
    return {key: value for key, value in tersor.models.find(name).small.items() if key not in SIZES}


def test_the_sequence_models_are_among_those_that_take_it() -> None:
    assert {"cot", "flashrnn", "h3", "linformer_lm", "lmuformer", "mamba", "s4", "s4d", "spt"} <= set(LISTOPS)
    assert set(takers("retrieval")) <= set(LISTOPS)
    assert {"s4", "spt"} <= set(takers("retrieval"))


@pytest.mark.parametrize("name", LISTOPS)
def test_every_one_answers_and_learns(name: str) -> None:
    torch.manual_seed(0)
    run = prepare("listops", name, None, model=small(name), data={**FEW, "length": 48}, pretrain={})
    batch = torch.utils.data.default_collate([run.sets.train[index] for index in range(4)])
    scores = answering(run.model, batch)
    assert 0 < scores["loss"] < 10
    scores["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.model.parameters())


@pytest.mark.parametrize(
    ("name", "argument", "shape"), [("s4d", "x", (1024, 1)), ("spt", "x", (1024, 1)), ("cot", "input_ids", (1025,))]
)
def test_pixels_are_numbers_or_tokens(name: str, argument: str, shape: tuple[int, ...]) -> None:
    run = prepare("pathfinder", name, None, model=small(name), data=FEW, pretrain={})
    assert run.sets.train[0][argument].shape == shape
    assert run.sets.preprocessing["long_range_arena"] == "pathfinder"


def test_a_language_model_answers_at_the_end_of_its_sequence() -> None:
    """What is padding does not matter to it."""
    run = prepare("listops", "cot", None, model=small("cot"), data={**FEW, "length": 48}, pretrain={})
    run.model.eval()
    batch = {name: value[None] for name, value in run.sets.train[0].items()}
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, batch["lengths"][0] :] = 5
    assert torch.equal(answering(run.model, batch)["loss"], answering(run.model, changed)["loss"])
    changed["input_ids"][0, 0] = 5 if batch["input_ids"][0, 0] != 5 else 6
    assert not torch.equal(answering(run.model, batch)["loss"], answering(run.model, changed)["loss"])


@pytest.mark.parametrize("name", ["s4", "spt"])
def test_pairs_are_compared_and_pretrained_on_one_by_one(name: str, tmp_path: Path) -> None:
    for part in ("train", "eval", "test"):
        (tmp_path / f"aan.{part}.tsv").write_text("1.0\ta\tb\tone text\tanother\n0.0\ta\tc\tone\tx\n")
    run = prepare("retrieval", name, tmp_path, model=small(name), data={"length": 16}, pretrain={})
    batch = torch.utils.data.default_collate([run.sets.train[index] for index in range(2)])
    assert batch["x"].shape == (2, 2, 16)
    assert answering(run.model.eval(), batch)["loss"] > 0
    swapped = {**batch, "x": batch["x"].flip(1), "lengths": batch["lengths"].flip(1)}
    assert not torch.allclose(
        answering(run.model, batch)["loss"], answering(run.model, swapped)["loss"]
    )  # [e, e', ...]
    assert len(run.alone) == 4
    assert run.holes.ratio == 0.15


@pytest.mark.parametrize(
    ("task", "name", "model", "said"),
    [
        ("retrieval", "s4d", {}, "s4d compares no pairs"),
        ("listops", "shvit", {}, "takes image; the Long Range Arena"),
        ("listops", "s4", {"d_output": 5}, r"needs d_output 10 of s4, not 5; leave model\.d_output out"),
        ("pathfinder", "s4d", {"d_input": 3}, r"needs d_input 1 of s4d, not 3"),
        ("pathfinder", "spt", {"vocab": 300}, r"leave model\.vocab out"),
    ],
)
def test_what_does_not_fit_is_said(task: str, name: str, model: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        prepare(task, name, None, model=model, data=FEW, pretrain={})


QUICK = ["--batch-size", "4", "--device", "cpu", "--set", "data.length=40", "--set", "data.train=8"]
QUICK += ["--set", "data.validation=2", "--set", "data.test=2", "--set", "model.d_model=8", "--set", "model.n_layers=1"]


def test_the_command_pretrains_trains_and_leaves_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "lra/listops", "--model", "spt", "--out", str(out), "--epochs", "2", *QUICK, "--json"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--set", "pretrain.epochs=1", "--set", "pretrain.lr=0.001", "--set", "pretrain.span=3"])
    assert stopped.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 4
    assert told["validation"].keys() == told["test"].keys() == {"loss", "accuracy"}
    state = torch.load(out / "pretraining" / "last.pt", weights_only=True)
    assert (state["run"]["step"], state["settings"]["lr"]) == (2, 0.001)
    assert state["model"]["decoder.weight"].shape == (18, 8)
    model = tersor.load(str(out))
    assert model(torch.randint(18, (1, 40)), lengths=torch.tensor([40])).shape == (1, 10)
    assert json.loads((out / "preprocessor_config.json").read_text())["long_range_arena"] == "listops"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lra/listops"], "lra/listops needs --model"),
        (["lra/chess", "--model", "spt"], "not 'chess'"),
        (["lra/listops", "--model", "spt", "--validation", "x"], "a validation part of its own"),
        (["lra/listops", "--model", "spt", "--set", "pretrain.lr=1"], "the table pretrain needs `epochs`"),
        (["lra/listops", "--model", "s4d", "--set", "pretrain.epochs=1"], "s4d has no outputs at every position"),
        (["lra/listops", "--model", "spt", "--set", "pretrain.epoch=1"], "pretrain needs `epochs`"),
        (["s4d", "--model", "spt"], "--model spt goes with lra/TASK"),
        (["s4d"], "s4d needs --data"),
        (["s4d", "--set", "pretrain.epochs=1"], "pretrain goes with lra/TASK"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = QUICK if "lra/listops" in arguments else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments, "--out", str(tmp_path / "run"), *quick])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
