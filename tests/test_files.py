"""A file is replaced at once, under a name that was nobody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.files import replacing


def test_a_file_is_replaced_under_a_name_of_nobody(tmp_path: Path) -> None:
    others = ("a.json.partial", ".a.json.partial", "a.json.new")
    for name in ("a.json", *others):
        (tmp_path / name).write_text("mine")
    with replacing(tmp_path / "a.json") as partial:
        partial.write_text("1")
    assert (tmp_path / "a.json").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as partial:
        raise KeyboardInterrupt
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.json": "1"} | dict.fromkeys(others, "mine")
