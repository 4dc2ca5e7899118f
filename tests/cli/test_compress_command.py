"""What `tersor compress` refuses, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Ran

from tersor.cli.job_options import split
from tersor.methods.method import methods


def test_every_method_is_a_command_of_its_own(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "--help")
    assert ran.status == 0
    assert all(f" {name} " in ran.out for name in methods())
    ran = tersor_command("compress", "ats", "--help")
    assert "--num-tokens" in ran.out
    assert "--rank" not in ran.out
    assert "--format" not in ran.out  # does nothing for methods on the whole model
    assert "--redo" in tersor_command("compress", "gptq", "--help").out


def test_the_former_way_to_name_a_method_goes_on_working(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "demo-vit", "--method", "ats", "--ats-blocks", "5", "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert (tmp_path / "out" / "config.json").exists()


def test_an_option_of_another_method(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "ats", "demo-vit", "--rank", "0.5", "--out", tmp_path / "out")
    assert ran.status == 2
    assert "there is no option --rank" in ran.err


def test_an_option_that_is_called_as_a_setting_is_the_method_s() -> None:
    given = {"head": True, "rank": 0.5, "seed": 3, "samples": None}
    assert split(given, [methods()["greenformers"]]) == ({"seed": 3}, {"head": True, "rank": 0.5})
    assert split({"head": True}, [methods()["gptq"]]) == ({"head": True}, {})


def test_an_unknown_method(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tersor_command("compress", "magnitud", "demo-vit", "--out", tmp_path / "out")
    assert (ran.status, ran.err) == (2, "tersor: there is no method magnitud; did you mean magnitude?\n")
    ran = tersor_command("compress", "demo-vit", "ats", "--out", tmp_path / "out")
    assert (ran.status, "the method comes first: tersor compress ats demo-vit" in ran.err) == (2, True)


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
    assert "there is no file or folder" in ran.err
    photo = tmp_path / "photo.png"
    photo.touch()
    ran = tersor_command("compress", "repquant", "demo-vit", "--out", tmp_path / "out", "--calibration", photo)
    assert f"text cannot calibrate it ({photo}): give --calibration a folder of images" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_result_replaces_another_where_that_is_asked(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    command = ("compress", "demo-vit", "--method", "greenformers", "--rank", "0.25", "--out", tmp_path / "out")
    assert tersor_command(*command).status == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert tersor_command(*command, "--include", "*.mlp.*", "--overwrite").status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
