"""What a command writes to is its own: nothing that the user has there is lost, whatever the options say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran, files_of

Command = Callable[..., Ran]
RTN = ("--method", "rtn", "--group-size", 32)


def refused(ran: Ran, *expected: str) -> None:
    assert ran.status == 2, ran
    lines = [line for line in ran.err.splitlines() if not line.startswith("forecast")]
    assert len(lines) == 1, ran.err
    for words in expected:
        assert words in lines[0]


@pytest.fixture(scope="module")
def made(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of tersor's."""
    import tersor

    out = tmp_path_factory.mktemp("made") / "out"
    tersor.compress(small_source, tersor.RTN(group_size=32), out=out)
    return out


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "result"))


def test_a_result_lists_its_files(made: Path) -> None:
    assert json.loads((made / "tersor.json").read_text())["files"] == sorted(files_of(made))


def test_a_project_with_a_config_of_its_own_is_not_emptied(
    tersor_command: Command, small_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "project"
    (out / "src").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "src" / "main.py").write_text("print()")
    before = files_of(out)
    for verb in (("quantize", *RTN), ("compress", "--method", "greenformers")):
        refused(
            tersor_command(verb[0], small_source, *verb[1:], "--out", out, "--overwrite"),
            "carries no mark of tersor's",
            "config.json would be lost",
        )
    assert files_of(out) == before


@pytest.mark.parametrize("verb", [("quantize", *RTN), ("compress", "--method", "greenformers", "--rank", "0.5")])
def test_what_a_job_reads_is_not_replaced(
    tersor_command: Command, result: Path, small: Path, tmp_path: Path, verb: tuple[object, ...]
) -> None:
    command, *options = verb
    before = files_of(tmp_path)
    for out in (small, tmp_path / "x" / ".." / "small"):
        (tmp_path / "x").mkdir(exist_ok=True)
        refused(tersor_command(command, small, *options, "--out", out, "--overwrite"), "is the model itself")
    text = result / "LICENSE"  # one of the result's own files
    refused(
        tersor_command(command, small, *options, "--out", result, "--overwrite", "--calibration", text, "--seq-len", 4),
        "holds the calibration",
    )
    shutil.move(small, result / "small")
    refused(
        tersor_command(command, result / "small", *options, "--out", result, "--overwrite"),
        "holds the model",
    )
    shutil.move(result / "small", small)
    inner = Path(shutil.move(result, small / "result"))
    refused(tersor_command(command, small, *options, "--out", inner, "--overwrite"), "lies in the model")
    shutil.move(inner, result)
    assert files_of(tmp_path) == before


def test_a_job_folder_that_is_a_link_is_refused(tersor_command: Command, small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "partial").write_text("Dear friend,")
    (tmp_path / "out" / ".tersor-job").symlink_to(tmp_path / "letters")
    for more in ((), ("--overwrite",)):
        ran = tersor_command("quantize", small_source, *RTN, "--out", tmp_path / "out", *more)
        refused(ran, ".tersor-job is a link")
    assert files_of(tmp_path / "letters") == {"partial": b"Dear friend,"}


def test_files_called_partial_are_left_alone(tersor_command: Command, small_source: Path, tmp_path: Path) -> None:
    for name in ("out.partial", ".out.partial", "out.gguf.partial", ".out.gguf.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter").write_text("Dear friend,")
    before = files_of(tmp_path)
    assert tersor_command("compress", "demo-vit", "--method", "greenformers", "--out", tmp_path / "out").status == 0
    assert tersor_command("export", small_source, "--out", tmp_path / "out.gguf").status == 0
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {
        *("out", "out.gguf", "out.partial", ".out.partial", "out.gguf.partial", ".out.gguf.partial")
    }


def test_a_result_may_be_called_like_a_model_of_the_package(
    tersor_command: Command, small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tersor_command("quantize", small_source, *RTN, "--out", "demo", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["size_after"] == (tmp_path / "demo" / "model.safetensors").stat().st_size
    ran = tersor_command("compress", "demo-vit", "--method", "greenformers", "--out", "demo-vit", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["size_after"] == (tmp_path / "demo-vit" / "model.safetensors").stat().st_size


def test_the_demo_refuses_a_directory_that_is_taken_before_it_starts(tersor_command: Command, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear friend,")
    ran = tersor_command("demo", "--out", tmp_path)
    refused(ran, "exists and is not empty")
    assert ran.out == ""


def test_a_sweep_writes_over_no_file_that_is_not_a_sweeps(
    tersor_command: Command, small_source: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {small_source}\nmethod: rtn\n")
    out = tmp_path / "out"
    for name, content, said in (
        ("sweep.json", "[1, 2]", "is no table of a sweep"),
        ("sweep.csv", "mine,too\n", "is no table of a sweep"),
        ("recipe/job.json", "[]", "does not say what job"),
        ("recipe/letter.txt", "Dear friend,", "is no job of a sweep"),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
        refused(tersor_command("sweep", tmp_path / "recipe.yaml", "--out", out), said)
        assert files_of(out) == {name: content.encode()}
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["config.json", "log.csv", "model.safetensors"])
def test_a_training_writes_over_no_file_that_is_not_a_trainings(
    tersor_command: Command, tmp_path: Path, name: str
) -> None:
    (tmp_path / "x.csv").write_text("\n".join(f"{n},{n % 7}" for n in range(100)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    options = [f"model.{each}" for each in ("d_model=8", "d_ff=8", "n_heads=2", "seq_len=8", "pred_len=4")]
    sets = [word for each in options for word in ("--set", each)]
    ran = tersor_command("train", "itransformer", "--data", tmp_path / "x.csv", "--out", tmp_path / "run", *sets)
    refused(ran, "no training left there; choose another folder")
    assert files_of(tmp_path / "run") == {name: b"mine"}
