"""What a message advises works with the command that prints it, and what was finished or is being made is said."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, Stopped, files_of
from safetensors.torch import load_file

import tersor
from tersor import GPTQ
from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.room import alone_in

Command = Callable[..., Ran]
SMALL = ("--group-size", 32, "--samples", 2, "--seq-len", 32)
STEPS = "steps: [{method: drop-blocks, blocks: 1}, {method: rtn, group_size: 32}]"
HUGE = 10**20


@pytest.mark.parametrize("job", ["quantize", "whole", "steps"])
def test_a_finished_job_given_again_is_no_error(
    tersor_command: Command, small_source: Path, tmp_path: Path, job: str
) -> None:
    recipe, out = tmp_path / "steps.yaml", tmp_path / "out"
    recipe.write_text(STEPS)
    command: tuple[object, ...] = {
        "quantize": ("quantize", small_source, "--method", "rtn", "--group-size", 32),
        "whole": ("compress", "drop-blocks", small_source, "--blocks", 1),
        "steps": ("compress", "recipe", recipe, small_source),
    }[job]
    assert tersor_command(*command, "--out", out).status == 0
    before = files_of(out)
    again = tersor_command(*command, "--out", out)
    assert (again.status, again.err) == (0, "")
    assert "holds the finished result of this very command" in again.out
    assert json.loads(tersor_command(*command, "--out", out, "--json").out)["finished_before"] is True
    change = ("--bits", 8) if job == "quantize" else ("--calibration", "builtin", "--samples", 3)
    other = tersor_command(*command, "--out", out, *change)
    assert other.status == 2
    assert "--overwrite" in other.err
    assert files_of(out) == before
    again = tersor_command(*command, "--out", out, *change, "--overwrite")
    assert again.status == 0, again.err


def test_of_two_jobs_on_one_output_the_second_is_told(
    tersor_command: Command, small_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "above" / "out"
    with alone_in(out):
        for command in (("quantize", small_source, *SMALL), ("train", "lra/listops", "--model", "s4")):
            ran = tersor_command(*command, "--out", out)
            assert ran.status == 2
            assert ran.err == f"tersor: another job is writing to {out}: let it finish, or give another --out\n"
    assert not out.parent.exists()  # what came to nothing leaves nothing


def test_activations_on_disk_lie_in_the_job_and_go_with_it(
    small_source: Path, tmp_path: Path, files_left: list[int]
) -> None:
    out, seen = tmp_path / "out", []

    def look(what: str, done: int, total: int) -> None:
        seen.extend(out.glob(f"{JOB_FOLDER}/.tmp-activations-*"))

    def run() -> None:
        tersor.compress(
            small_source, GPTQ(group_size=32), out=out, samples=2, seq_len=64, activations="disk", progress=look
        )

    files_left[0] = 3
    with pytest.raises(Stopped):
        run()
    assert seen
    assert not any(each.exists() for each in seen)
    left = out / JOB_FOLDER / ".tmp-activations-of-a-killed-job"
    left.mkdir()
    (left / "0.pt").touch()
    files_left[0] = 10**9
    run()
    assert not (out / JOB_FOLDER).exists()


def test_files_can_be_read_by_whom_the_mask_lets(tersor_command: Command, small_source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        packed, dense, recipe = tmp_path / "packed", tmp_path / "dense", tmp_path / "steps.yaml"
        recipe.write_text(STEPS)
        assert tersor_command("quantize", small_source, *SMALL, "--out", packed).status == 0
        assert tersor_command("compress", "recipe", recipe, small_source, "--out", dense).status == 0
        assert tersor_command("compress", "drop-blocks", small_source, "--out", dense, "--overwrite").status == 0
        assert tersor_command("export", packed, "--out", tmp_path / "small.gguf").status in (0, 2)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        if path != recipe:
            assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_export_does_not_take_a_folder_for_a_file_that_overwrite_replaces(
    tersor_command: Command, small_source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    ran = tersor_command("export", small_source, "--out", folder, "--overwrite")
    assert ran.status == 2
    assert ran.err == f"tersor: {folder} is a folder; give a file\n"


def test_pickled_weights_are_read_by_the_commands_that_the_error_names(
    tersor_command: Command, small: Path, tmp_path: Path
) -> None:
    torch.save(load_file(small / "model.safetensors"), small / "pytorch_model.bin")
    (small / "model.safetensors").unlink()
    ran = tersor_command("inspect", small)
    assert ran.status == 2
    assert "`tersor quantize` and `tersor compress` read them without running any with --allow-pickle" in ran.err
    for verb in (("quantize", small, "--method", "rtn", "--group-size", 32), ("compress", "drop-blocks", small)):
        assert tersor_command(*verb, "--allow-pickle", "--out", tmp_path / str(verb[0])).status == 0
    tersor.load(small, allow_pickle=True)


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "demo", "--out", "out", "--samples", HUGE),
        ("quantize", "demo", "--out", "out", "--bits", HUGE),
        ("compress", "drop-blocks", "demo", "--out", "out", "--seq-len", HUGE),
        ("compress", "rtn", "demo", "--out", "out", "--group-size", -HUGE),
        ("generate", "demo", "text", "--max-new-tokens", HUGE),
        ("eval", "demo", "--max-windows", HUGE),
        ("bench", "demo", "--new-tokens", HUGE),
        ("train", "s4", "--data", ".", "--out", "out", "--max-steps", HUGE),
        ("forecast", "ridge", "--data", ".", "--horizon", HUGE),
    ],
)
def test_counts_fit_in_64_bits(
    tersor_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tersor_command(*command)
    assert ran.status == 2
    assert "does not fit in 64 bits" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{method: gptq, sym: "no"}', "sym='no' is not allowed"),
        ("{method: gptq, bits: 4.0}", "bits=4.0 is not allowed"),
        ('{method: gptq, damp: "0.01"}', "damp='0.01' is not allowed"),
        ("{method: gptq, desc_act: 1}", "desc_act=1 is not allowed"),
        ('{method: gptq, rules: [{match: "*", sym: "no"}]}', "sym='no' is not allowed"),
        ("{method: gptq, group_size: 100000000000000000000}", "does not fit in 64 bits"),
    ],
)
def test_a_recipe_takes_values_of_an_options_own_kind(
    tersor_command: Command, small_source: Path, tmp_path: Path, said: str, expected: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(said)
    ran = tersor_command("quantize", small_source, "--recipe", recipe, "--out", tmp_path / "out")
    assert ran.status == 2
    assert expected in ran.err
    assert not (tmp_path / "out").exists()
