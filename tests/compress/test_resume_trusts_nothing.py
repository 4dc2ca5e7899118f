"""A job that goes on looks at everything that it takes over: what is not what it was is solved again, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKENIZER, Ran, change_tensors, files_of

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.methods.method import Method

FIRST, SECOND = "model.layers.0", "model.layers.1"
ASKED = {"samples": 2, "seq_len": 32}


def stop_after(block: str) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == f"compressed {block}" or (what == "writing" and block == "all"):
            raise KeyboardInterrupt

    return progress


def start(model: Path, out: Path, *, after: str = FIRST, method: Method | None = None) -> Path:
    with pytest.raises(KeyboardInterrupt):
        tersor.compress(model, method or GPTQ(group_size=32), out=out, progress=stop_after(after), **ASKED)
    return out / ".tersor-job"


def go_on(model: Path, out: Path, **more: Any) -> tuple[int, list[str]]:
    """How many blocks were taken over, and what was said."""
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if total == 0 and not what.startswith("forecast") and "tokens are few" not in what:
            said.append(what)

    method = more.pop("method", GPTQ(group_size=32))
    asked = ASKED if method.needs_samples else {}
    return tersor.compress(model, method, out=out, progress=progress, **asked, **more).summary.resumed_blocks, said


@pytest.fixture(scope="module")
def whole(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    tersor.compress(small_source, GPTQ(group_size=32), out=out, **ASKED)
    return files_of(out)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "another file": lambda path: path.write_text("Dear friend,"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_block_whose_file_is_not_what_was_written_is_solved_again(
    small_source: Path, tmp_path: Path, whole: dict[str, bytes], damage: str
) -> None:
    out = tmp_path / "out"
    folder = start(small_source, out, after="all")
    DAMAGES[damage](folder / f"{FIRST}.safetensors")
    taken, said = go_on(small_source, out)
    assert taken == 1
    assert said == [f"{FIRST} in {folder} is not what was written there, and is solved again"]
    assert files_of(out) == whole


@pytest.mark.parametrize("entry", ["rows", "a number"])
def test_a_block_whose_line_in_the_journal_is_broken_is_solved_again(
    small_source: Path, tmp_path: Path, whole: dict[str, bytes], entry: str
) -> None:
    out = tmp_path / "out"
    journal = start(small_source, out, after="all") / "journal.json"
    content = json.loads(journal.read_text())
    if entry == "rows":
        content["done"][FIRST] = [3]
    else:
        content["done"][FIRST][0]["error"] = 7.0
    journal.write_text(json.dumps(content))
    taken, said = go_on(small_source, out)
    assert taken == 1
    assert len(said) == 1
    assert files_of(out) == whole


def test_what_lies_in_the_folder_of_a_job_and_is_not_of_it_stays(
    small_source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    folder = start(small_source, out)
    for name in ("rest.safetensors", "partial", f"{SECOND}.safetensors"):  # names of tersor's own
        (folder / name).write_text("junk")
    (folder / "notes.txt").write_text("mine")
    taken, said = go_on(small_source, out)
    assert taken == 1
    assert said == [f"{folder / 'notes.txt'} is not tersor's, and stays"]
    assert files_of(out) == whole | {".tersor-job/notes.txt": b"mine"}


def test_nothing_is_written_through_links_in_the_folder_of_a_job(
    small_source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out, letter = tmp_path / "out", tmp_path / "letter.txt"
    folder = start(small_source, out)
    letter.write_text("Dear friend,")
    for name in ("partial", "rest.safetensors", f"{SECOND}.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(letter)
    go_on(small_source, out)
    assert letter.read_text() == "Dear friend,"
    assert files_of(out) == whole


@pytest.mark.parametrize("cut", [200, -1])
def test_a_truncated_journal_is_refused_and_the_way_out_works(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path, whole: dict[str, bytes], cut: int
) -> None:
    out = tmp_path / "out"
    journal = start(small_source, out, after="all") / "journal.json"
    journal.write_bytes(journal.read_bytes()[:cut] if cut >= 0 else b"\xff\x00")
    command = ("quantize", small_source, "--out", out, "--samples", 2, "--seq-len", 32, "--group-size", 32)
    ran = tersor_command(*command)
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert "journal.json is damaged" in ran.err
    assert "--overwrite starts anew" in ran.err
    assert tersor_command(*command, "--overwrite").status == 0
    assert files_of(out) == whole


def change_a_weight(model: Path) -> None:
    """In place: size, times and all that a look at parts of the file would show stay the same."""
    path = model / "model.safetensors"
    times = path.stat()
    change_tensors(model, lambda tensors: tensors[f"{FIRST}.mlp.down_proj.weight"].mul_(1.001))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("kind", ["gptq", "rtn", "rtn without samples"])
def test_weights_that_changed_between_two_runs_are_never_mixed(small: Path, tmp_path: Path, kind: str) -> None:
    out, method = tmp_path / "out", GPTQ(group_size=32) if kind == "gptq" else RTN(group_size=32)
    if kind == "rtn without samples":
        for name in TOKENIZER:
            (small / name).unlink()
    if kind == "gptq":
        start(small, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(small, method, out=out, progress=stop_after("all"))
    change_a_weight(small)
    before = files_of(out)
    with pytest.raises(
        TersorError, match=rf"{FIRST}\.mlp\.down_proj\.weight has changed since; --overwrite starts anew"
    ):
        go_on(small, out, method=method)
    assert files_of(out) == before
    assert go_on(small, out, method=method, overwrite=True)[0] == 0


def test_weights_that_change_while_the_job_runs_are_refused(small: Path, tmp_path: Path) -> None:
    changed = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("forecast") and not changed:
            changed.append(change_a_weight(small))

    with pytest.raises(TersorError, match="the model changed while the job ran"):
        tersor.compress(small, RTN(group_size=32), out=tmp_path / "out", progress=progress)


def test_a_finished_result_is_looked_at_before_a_part_of_it_is_solved_again(
    small: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    go_on(small, out)
    change_tensors(out, lambda tensors: tensors[f"{SECOND}.mlp.down_proj.qweight"].bitwise_xor_(1))
    taken, said = go_on(small, out, redo=[f"{FIRST}.*"])
    assert taken == 0
    assert len(said) == 1
    assert said[0].startswith(SECOND)
    assert files_of(out) == whole
    change_a_weight(small)
    with pytest.raises(TersorError, match=r"other weights; --overwrite makes it anew"):
        go_on(small, out, redo=[f"{FIRST}.*"])
    assert files_of(out) == whole
