"""A verb opens a model once and hands it on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran

from tersor.checkpoint.source import resolve

Command = Callable[..., Ran]
_read: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def note_what_is_read() -> None:
    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            _read.append(os.fspath(arguments[0]))  # type: ignore[arg-type]

    sys.addaudithook(note)  # for as long as the process lives


@pytest.mark.parametrize("verb", ["eval", "predict", "quantize"])
def test_the_config_of_a_model_is_read_once(verb: str, tmp_path: Path, tersor_command: Command) -> None:
    from PIL import Image

    picture = tmp_path / "airplane" / "black.png"
    picture.parent.mkdir()
    Image.new("RGB", (32, 32)).save(picture)
    given = {
        "eval": ["--images", tmp_path],
        "predict": [picture],
        "quantize": [
            "--method",
            "rtn",
            "--format",
            "compressed-tensors",
            "--group-size",
            32,
            "--out",
            tmp_path / "out",
        ],
    }
    _read.clear()
    ended = tersor_command(verb, "demo-vit", *given[verb])
    assert ended.status == 0, ended.err
    assert _read.count(str(resolve("demo-vit") / "config.json")) == 1
