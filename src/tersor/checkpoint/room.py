"""Which files in an output directory are tersor's own. Only these are ever removed.

A result lists its files in its own record, `tersor.json`: {"files": ["config.json", "model.safetensors", ...], ...}. A directory
may be replaced where it has such a record, holds nothing else, and lies apart from everything that the job reads. Links count as
nobody's: they are neither followed nor removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.source import Checkpoint
from tersor.errors import TersorError
from tersor.files import umask

RESULT_FILE = "tersor.json"
RUN_FILE = "tersor-run.json"  # how the job went: times and memory, which differ from run to run
JOURNAL = f"{JOB_FOLDER}/journal.json"
SCRATCH = ".tmp"  # how names begin in the job's folder that mean nothing once the job has ended
OWN_IN_JOB = (JOURNAL, f"{JOB_FOLDER}/partial", f"{JOB_FOLDER}/rest.safetensors")

Inputs = Mapping[str, Path]  # what a job reads: {what it is, such as "model": where it lies}


def record_of(out: Path) -> dict[str, Any] | None:
    """What a finished result in `out` says of itself, None where there is none."""
    return read_object(out / RESULT_FILE)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where it is no such file."""
    found = read_json(path)
    return found if isinstance(found, dict) else None


def read_json(path: Path) -> Any:
    """What a JSON file holds, None where it is none."""
    if not is_plain_file(path):
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return None


def own_names(out: Path) -> set[str]:
    """The files in `out` that its records call tersor's, relative to it. Empty where there is no record."""
    record, journal = record_of(out), read_object(out / JOURNAL)
    names: set[str] = set()
    blocks: list[str] = []
    if record is not None and RESULT_FILE in (files := _words(record.get("files"))):
        names |= set(files)
        blocks += _words(record.get("blocks"))
    if journal is not None:
        names |= {name for key in ("files", "emptying") for name in _words(journal.get(key))}
        blocks += [name for key in ("blocks", "done") for name in _words(journal.get(key))]
    if names or journal is not None:
        names |= {*OWN_IN_JOB, *map(block_name, blocks)}
    return names


def block_name(block: str) -> str:
    """Where an unfinished job keeps a block, relative to its output directory."""
    return f"{JOB_FOLDER}/{block or 'model'}.safetensors"


def _words(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | dict) else []


def is_plain_file(path: Path) -> bool:
    """Whether this is a file: no link, device or pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def strangers(out: Path, own: Collection[str]) -> Iterator[str]:
    """Names of what lies in `out` beside `own`: other files, directories without a file of `own`, links."""
    ways = {JOB_FOLDER, *(parent for name in own for parent in _parents(name))}

    def search(folder: Path, prefix: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False) and name in ways:
                    yield from search(Path(entry.path), f"{name}/")
                elif not (entry.is_file(follow_symlinks=False) and name in own) and not _is_scratch(name, entry):
                    yield name

    yield from search(out, "")


def _is_scratch(name: str, entry: os.DirEntry[str]) -> bool:
    """What a killed job leaves: files that safetensors began under names of its own, activations that waited on disk."""
    return name.startswith(f"{JOB_FOLDER}/{SCRATCH}") and not entry.is_symlink()


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def remove_own(out: Path, own: Collection[str], *, keep: Collection[str] = ()) -> None:
    """Remove the files in `own` that are not in `keep`, and directories below `out` that held nothing else."""
    ways = {JOB_FOLDER, *(parent for name in own for parent in _parents(name))}

    def clear(folder: Path, prefix: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda each: each.name):
            name, path = prefix + entry.name, Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and name in ways:
                clear(path, f"{name}/")
                if not any(path.iterdir()):
                    path.rmdir()
            elif entry.is_dir(follow_symlinks=False) and _is_scratch(name, entry):
                shutil.rmtree(path)
            elif (
                entry.is_file(follow_symlinks=False) and name not in keep and (name in own or _is_scratch(name, entry))
            ):
                path.unlink()

    clear(out, "")


def inputs_of(checkpoint: Checkpoint, **others: object) -> dict[str, Path]:
    """What a job reads: the model, those of its files that are links to elsewhere, and those of `others` that are existing
    paths."""
    found = {"model": checkpoint.origin or checkpoint.directory}
    for path in {*checkpoint.shard_of.values(), *checkpoint.other_files()}:
        if path.is_symlink():
            found[f"model's file {path.name}"] = path
    for what, other in others.items():
        if isinstance(other, str | Path) and str(other) and os.path.exists(Path(other).expanduser()):
            found[what] = Path(other).expanduser()
    return found


def check_replaceable(out: Path, own: Collection[str], inputs: Inputs, *, kept: str) -> None:
    """Raise TersorError, naming what would be lost, where a directory that is not empty may not be replaced.

    kept: the words by which the error says that nothing was done.
    """
    if out.is_symlink():
        raise TersorError(f"{out} is a link, so {kept}; give the directory that it leads to: {out.resolve()}")
    here = out.resolve()
    for what, path in inputs.items():
        there = path.resolve()
        if here == there or here in there.parents or there in here.parents:
            relation = "is" if here == there else "holds" if here in there.parents else "lies in"
            raise TersorError(f"{out} {relation} the {what} ({path}), so {kept}; give another directory")
    lost = next((name for name in strangers(out, own) if not name.startswith(f"{JOB_FOLDER}/")), None)
    if lost is None:
        return
    if own_names(out):
        reason = "holds what tersor did not write"
    else:
        reason = "carries no mark of tersor's" if (out / "config.json").exists() else "is no model directory"
    raise TersorError(
        f"{out} {reason}, so {kept}: {lost} would be lost; move it away yourself, or give another directory"
    )


def check_free(target: Path, *, overwrite: bool, inputs: Inputs | None = None) -> None:
    """Raise TersorError where a result may not be written to `target`."""
    if target.exists() and not target.is_dir():
        raise TersorError(f"{target} is a file; give a directory")
    for what, path in (inputs or {}).items():
        if target.resolve() == path.resolve():
            raise TersorError(f"{target} is the {what} itself; give another output directory")
    with disk_errors(target):
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise TersorError(f"{target} exists and is not empty; give another directory, or --overwrite")
            own = own_names(target)
            check_replaceable(target, own, inputs or {}, kept="it is not overwritten")
            left = next(strangers(target, own), None)
            if left is not None:
                raise TersorError(f"{target} is not overwritten: {left} would be lost; move it away yourself")


@dataclass
class Held:
    """The hold that a job has on its output directory (`alone_in`)."""

    # Marks the job's result, so that a finished one is known even if the process was killed before it wrote its run record.
    mark: str | None = None
    locks: list[int] = field(default_factory=list)

    def sign(self, folder: Path) -> None:
        """Write the mark into a folder whose result is about to be finished."""
        if self.mark is not None:
            (folder / RUN_FILE).write_text(json.dumps({"asked": self.mark}) + "\n", encoding="utf-8")

    def take(self, folder: Path) -> None:
        """Also hold a folder that is about to become the output directory."""
        self.sign(folder)
        lock = os.open(folder, os.O_RDONLY)
        self.locks.append(lock)
        with suppress(OSError):  # where the disk knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def appearing(
    target: Path, *, overwrite: bool, inputs: Inputs | None = None, held: Held | None = None
) -> Iterator[Path]:
    """Yields a new directory to write into. In the end it becomes `target`: whole, or not at all. held: the job's hold on
    `target`; it moves to the new directory."""
    check_free(target, overwrite=overwrite, inputs=inputs)
    real = target.resolve()
    with disk_errors(target):
        real.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".tersor-", suffix=".partial", dir=real.parent))
        try:
            yield partial
            check_free(target, overwrite=overwrite, inputs=inputs)  # it may have changed since
            if real.is_dir():
                remove_own(real, own_names(real))
                real.rmdir()
            if held is not None:
                held.take(partial)
            _open_to_others(partial)
            partial.rename(real)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give others the access that the user's umask allows. Temporary directories, and files that safetensors writes, are made for
    their owner alone."""
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def alone_in(out: Path) -> Iterator[Held]:
    """Hold the output directory: a second job on it is refused. The lock ends with the process, however that ends.

    A missing directory is made, and removed again if it stays empty. On a disk that has no locks, nothing is refused.
    """
    if os.path.lexists(out) and not out.is_dir():
        yield Held()  # whoever writes says what is wrong
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        held = Held(locks=[os.open(out, os.O_RDONLY)])
    try:
        try:
            fcntl.flock(held.locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _another_job(out) from None
        except OSError:
            pass
        if not (out.is_dir() and os.path.samestat(os.fstat(held.locks[0]), out.stat())):
            raise _another_job(out)  # it put its result in the place of the directory that was opened here
        yield held
    finally:
        for lock in held.locks:
            os.close(lock)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _another_job(out: Path) -> TersorError:
    return TersorError(f"another job is writing to {out}: let it finish, or give another --out")


def write_record(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the record of a result. All its other files are in `folder` already."""
    files = sorted(
        {RESULT_FILE, RUN_FILE, *(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())}
    )
    text = json.dumps({**result, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (folder / RESULT_FILE).write_text(text, encoding="utf-8")
