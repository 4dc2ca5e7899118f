"""Nothing of the user's is removed: only what tersor's own record lists, in a directory that holds nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.checkpoint.hashes import Seen
from tersor.checkpoint.room import OWN_IN_JOB, RESULT_FILE, appearing, own_names, remove_own, strangers, write_record
from tersor.checkpoint.source import Checkpoint
from tersor.checkpoint.writer import ResultWriter
from tersor.errors import TersorError

NAMES = st.sampled_from(
    [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "sub",
        ".tersor-job",
        "journal.json",
        "partial",
        "tersor.json",
        "ä",
    ]
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
TREES = st.dictionaries(
    PATHS, st.sampled_from(["file", "directory", "link to a file", "link to a directory"]), max_size=8
)


def grow(root: Path, tree: dict[str, str], outside: Path) -> None:
    """Make what fits of a tree; a path that leads through a file or link is left out."""
    for name, kind in sorted(tree.items()):
        path = root / name
        above = [root.joinpath(*Path(name).parts[:n]) for n in range(1, len(Path(name).parts))]
        if os.path.lexists(path) or any(each.is_symlink() or each.is_file() for each in above):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_text(f"the user's {name}")
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to(outside / ("file" if kind == "link to a file" else "folder"))


def everything(root: Path) -> dict[str, object]:
    """All that lies under a directory, links as links."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
    return found


def result(folder: Path) -> Path:
    with appearing(folder, overwrite=False) as partial:
        (partial / "processor").mkdir()
        for name in ("config.json", "model.safetensors", "processor/nested.json"):
            (partial / name).write_text("tersor's")
        write_record(partial, {"method": "none"})
    return folder


@given(tree=TREES, marked=st.booleans(), listed=st.sets(PATHS, max_size=3))
def test_no_byte_outside_a_result_changes(tree: dict[str, str], marked: bool, listed: set[str]) -> None:
    """Of a random tree, with and without a result of tersor's in it, either nothing changes or all that goes was tersor's."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "elsewhere" / "folder").mkdir(parents=True)
        for name in ("file", "folder/file"):
            (root / "elsewhere" / name).write_text("the user's, elsewhere")
        out = root / "out"
        if marked:
            result(out)
        else:
            out.mkdir()
        grow(out, tree, root / "elsewhere")
        before, own = everything(root), own_names(out)
        try:
            with appearing(out, overwrite=True) as partial:
                (partial / "new").write_text("new")
        except TersorError:
            assert everything(root) == before
        else:
            assert set(everything(out)) == {"new"}
            mine = {name: what for name, what in before.items() if not name.startswith("out")}
            assert {name: what for name, what in everything(root).items() if not name.startswith("out")} == mine
            lost = {name.removeprefix("out/") for name, what in before.items() if name.startswith("out/")}
            ways = {Path(name).parent.as_posix() for name in own}
            assert lost <= own | ways | {".tersor-job"}


@given(tree=TREES, own=st.sets(PATHS, max_size=6))
def test_what_is_removed_is_named_and_never_a_link(tree: dict[str, str], own: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, outside = Path(folder) / "out", Path(folder) / "outside"
        (outside / "folder").mkdir(parents=True)
        (outside / "file").write_text("outside")
        root.mkdir()
        grow(root, tree, outside)
        before, strange = everything(root), set(strangers(root, own))
        remove_own(root, own)
        after = everything(root)
        assert (outside / "file").read_text() == "outside"
        assert {name: before[name] for name in after} == after
        for name in before.keys() - after.keys():
            assert name in own or (before[name] == "directory")
            assert not (root / name).is_symlink()
        assert all(name in after for name in strange)


@given(tree=TREES, overwrite=st.booleans(), marked=st.booleans())
def test_a_job_writes_over_nothing_but_its_own(tree: dict[str, str], overwrite: bool, marked: bool) -> None:
    """Whatever lies in its output directory: all stays, or all that goes was of an earlier result or job."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "elsewhere" / "folder").mkdir(parents=True)
        (root / "elsewhere" / "file").write_text("the user's, elsewhere")
        out = root / "out"
        if marked:
            result(out)
        else:
            out.mkdir()
        grow(out, tree, root / "elsewhere")
        before, own = everything(root), own_names(out) | {*OWN_IN_JOB, "processor"}
        job = ResultWriter(out, Checkpoint(root / "elsewhere", {}, {}, seen=Seen()), blocks=["model.layers.0"])
        try:
            job.start({"model": "this one"}, overwrite=overwrite)
            went = own if overwrite else {*OWN_IN_JOB}
        except TersorError:
            went = set()
        after = everything(root)
        for name, what in before.items():
            assert after.get(name) == what or name.removeprefix("out/") in went


def test_a_result_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    with pytest.raises(TersorError, match="exists and is not empty"), appearing(out, overwrite=False):
        pass

    def write_half() -> None:
        with appearing(out, overwrite=True) as partial:
            (partial / "new").write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert sorted(everything(out)) == [
        "config.json",
        "model.safetensors",
        "processor",
        "processor/nested.json",
        RESULT_FILE,
    ]
    with appearing(out, overwrite=True) as partial:
        (partial / "new").write_text("all of it")
    assert sorted(everything(out)) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("stranger", "named"),
    [("notes.txt", "notes.txt"), ("processor/notes.txt", "processor/notes.txt"), ("src/main.py", "src")],
)
def test_what_would_be_lost_is_named(tmp_path: Path, stranger: str, named: str) -> None:
    out = result(tmp_path / "out")
    (out / stranger).parent.mkdir(exist_ok=True)
    (out / stranger).write_text("mine")
    before = everything(tmp_path)
    with (
        pytest.raises(TersorError, match=f"holds what tersor did not write.*: {named} would be lost"),
        appearing(out, overwrite=True),
    ):
        pass
    assert everything(tmp_path) == before


def test_a_directory_without_a_record_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    for record in (
        None,
        "{",
        "[]",
        "{}",
        '{"files": ["config.json"]}',
        '{"files": {"tersor.json": 1, "config.json": [2]}',
    ):
        if record is not None:
            (tmp_path / "project" / RESULT_FILE).write_text(record)
        with (
            pytest.raises(TersorError, match="carries no mark of tersor's"),
            appearing(tmp_path / "project", overwrite=True),
        ):
            pass
    assert (tmp_path / "project" / "config.json").read_text() == "{}"


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (tmp_path / "link").symlink_to(out / "model.safetensors")
    for path, relation in (
        (out, "is the model"),
        (out / "model.safetensors", "holds the model"),
        (tmp_path, "lies in the model"),
        (tmp_path / "link", "holds the model"),
    ):
        with pytest.raises(TersorError, match=relation), appearing(out, overwrite=True, inputs={"model": path}):
            pass
    assert (out / "model.safetensors").read_text() == "tersor's"


def test_links_are_not_followed(tmp_path: Path) -> None:
    out = result(tmp_path / "real")
    (tmp_path / "out").symlink_to(out)
    before = everything(tmp_path)
    with pytest.raises(TersorError, match="is a link"), appearing(tmp_path / "out", overwrite=True):
        pass
    assert everything(tmp_path) == before
    shutil.move(out / "processor", tmp_path / "processor")
    (out / "processor").symlink_to(tmp_path / "processor")
    with pytest.raises(TersorError, match="processor would be lost"), appearing(out, overwrite=True):
        pass
    assert (tmp_path / "processor" / "nested.json").exists()
