"""What `tersor compress` refuses, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Ran


def test_a_method_of_the_other_verb(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "demo-vit", "--method", "gptq", "--out", tmp_path / "out")
    assert ran.status == 2
    assert ran.err == "tersor: gptq works block by block: tersor quantize --method gptq\n"


def test_an_option_of_another_method(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "demo-vit", "--method", "ats", "--rank", "0.5", "--out", tmp_path / "out")
    assert ran.status == 2
    assert "method ats has no option 'rank'; it has ats_blocks" in ran.err


def test_a_directory_that_is_taken_is_refused_at_once(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    command = ("compress", "demo-vit", "--method", "greenformers", "--out", tmp_path / "out")
    ran = tersor_command(*command)
    assert ran.status == 2
    assert "exists and is not empty" in ran.err
    ran = tersor_command(*command, "--overwrite")
    assert ran.status == 2
    assert "is no model directory, so it is not overwritten" in ran.err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_images_that_are_not_there(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command(
        "compress",
        "demo-vit",
        "--method",
        "repquant",
        "--out",
        tmp_path / "out",
        "--calibration",
        tmp_path / "none.npz",
    )
    assert ran.status == 2
    assert "no images at" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_result_replaces_another_where_that_is_asked(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    command = ("compress", "demo-vit", "--method", "greenformers", "--rank", "0.25", "--out", tmp_path / "out")
    assert tersor_command(*command).status == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert tersor_command(*command, "--include", "*.mlp.*", "--overwrite").status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
