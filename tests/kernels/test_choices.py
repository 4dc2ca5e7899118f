"""A choice outlives its process, and what cannot be read is as if it were not there."""

from pathlib import Path

import pytest

from tersor.kernels import choices, nvrtc


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path / "kernels")


def test_the_fastest_of_those_at_hand_is_recalled() -> None:
    assert choices.recall("a shape", ["one", "two"]) is None
    choices.keep("a shape", {"one": 3.0, "two": 2.0, "three": 1.0})
    assert choices.recall("a shape", ["one", "two"]) == "two"
    assert choices.recall("a shape", ["one", "two", "three"]) == "three"
    assert choices.recall("another shape", ["one", "two"]) is None
    choices.keep("a shape", {"one": 1.0, "two": 2.0})
    assert choices.recall("a shape", ["one", "two"]) == "one"


def test_candidates_that_were_not_measured_ask_for_a_new_measurement() -> None:
    choices.keep("a shape", {"one": 3.0})
    assert choices.recall("a shape", ["one", "new"]) is None


@pytest.mark.parametrize("said", ["", "{", "[]", "null", '{"microseconds": []}', '{"microseconds": {"one": "fast"}}'])
def test_a_damaged_file_is_measured_again(said: str) -> None:
    choices.keep("a shape", {"one": 3.0})
    (kept,) = nvrtc.CACHE.glob("choice-*.json")
    kept.write_text(said)
    assert choices.recall("a shape", ["one"]) is None


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the directory should be")
    choices.keep("a shape", {"one": 3.0})
    assert choices.recall("a shape", ["one"]) is None
