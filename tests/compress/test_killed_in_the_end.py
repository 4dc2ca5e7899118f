"""A process that is killed between the last rename and the end: the result is known as finished, and held until then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tersor
from tersor import RTN, TersorError
from tersor.checkpoint.room import RUN_FILE, alone_in, appearing
from tersor.compress import from_options, steps
from tersor.errors import FinishedError
from tersor.methods.method import Method

ROUND = RTN(group_size=32)
DROP = from_options("drop-blocks", {"blocks": 1})
JOBS: dict[str, Method | list[Method]] = {"blocks": ROUND, "whole": DROP, "steps": [DROP, ROUND]}


class Killed(BaseException):
    pass


def die(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("kind", JOBS)
def test_a_result_whose_run_was_not_written_is_known_as_finished(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tersor.compress.job.write_run", die)
        with pytest.raises(Killed):
            tersor.compress(small_source, JOBS[kind], out=out)
    with pytest.raises(FinishedError, match="holds the finished result of this very command"):
        tersor.compress(small_source, JOBS[kind], out=out)
    with pytest.raises(TersorError, match="exists and is not empty"):
        tersor.compress(small_source, DROP, out=out, samples=3, calibration="builtin")


def test_what_lay_between_the_steps_of_a_finished_job_is_removed(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_summary", die)
        with pytest.raises(Killed):
            tersor.compress(small_source, JOBS["steps"], out=out)
    assert (tmp_path / ".tersor-steps-out").is_dir()
    with pytest.raises(FinishedError):
        tersor.compress(small_source, JOBS["steps"], out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_directory_stays_held_when_another_takes_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone_in(out) as held:
        held.mark = "a job"
        before = out.stat().st_ino
        with appearing(out, overwrite=False, held=held) as partial:
            (partial / "config.json").write_text("{}")
        assert out.stat().st_ino != before
        assert (out / RUN_FILE).read_text() == '{"asked": "a job"}\n'
        with pytest.raises(TersorError, match="another job is writing"), alone_in(out):
            pass
    with alone_in(out):
        pass


def test_a_lock_on_a_directory_that_was_replaced_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    really = os.open

    def replaced(path: Path, flags: int) -> int:
        opened = really(path, flags)
        out.rename(tmp_path / "old")
        out.mkdir()
        return opened

    monkeypatch.setattr("tersor.checkpoint.room.os.open", replaced)
    with pytest.raises(TersorError, match="another job is writing"), alone_in(out):
        pass


def test_a_large_calibration_file_is_known_by_size_time_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "READ_WHOLE", 100)
    monkeypatch.setattr(steps, "PIECE", 10)
    file = tmp_path / "text.txt"

    def known(text: bytes, stamp: int) -> str:
        file.write_bytes(text)
        os.utime(file, (stamp, stamp))
        return steps._hash_of_file(file)

    text = bytes(range(200))
    first = known(text, 1)
    assert known(text, 1) == first
    assert known(text, 2) != first
    assert known(text + b"x", 1) != first
    for at in (0, 105, 199):
        assert known(text[:at] + b"?" + text[at + 1 :], 1) != first
    small = known(text[:90], 1)
    assert known(text[:90], 2) == small
