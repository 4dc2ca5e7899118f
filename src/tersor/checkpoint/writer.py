"""Write a compressed checkpoint block by block, so that a job that is stopped at any moment loses little.

While the job runs, OUT holds one folder, `.tersor-job`, with `journal.json` and one safetensors file per block. The journal
says what is made from what, which files are tersor's, and which blocks are done. It also holds the hash of every tensor that
was read and of every block that was written. A run that goes on checks them: a block that has changed is solved again, a model
that has changed is refused. Every file appears by a rename, so it is whole or absent. `place` puts the shards, config and other
files beside the folder. `seal` finishes the result: it removes first the journal, then the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.hashes import Seen, block_hash
from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.room import (
    JOURNAL,
    OWN_IN_JOB,
    RESULT_FILE,
    RUN_FILE,
    SCRATCH,
    Inputs,
    block_name,
    check_replaceable,
    is_plain_file,
    own_names,
    read_object,
    record_of,
    remove_own,
    strangers,
)
from tersor.checkpoint.source import INDEX, Checkpoint
from tersor.checkpoint.splice import Piece, pieces_of, splice
from tersor.errors import FinishedError, TersorError
from tersor.files import settle, umask

SINGLE_FILE_LIMIT = 5 * 10**9  # bytes; a larger result keeps one shard per block


class ResultWriter:
    """An unfinished result in `out`. `done` maps each finished block to its reports.

    source: the model; its `seen` notes the hashes of what is read. blocks: all that may be written. inputs: what else the job
    reads.
    tell: takes one line for the user.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        *,
        blocks: Collection[str] = (),
        inputs: Inputs | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.out, self.folder, self.source = out, out / JOB_FOLDER, source
        self.blocks, self.inputs, self.tell = list(blocks), inputs or {}, tell
        self.seen = source.seen or Seen()
        self.done: dict[str, list[dict[str, Any]]] = {}
        self.hashes: dict[str, str] = {}  # of the blocks in `done`
        self._fingerprint: dict[str, str] = {}
        self._files: list[str] = []  # what tersor wrote or is about to write beside the folder
        self._emptying: list[str] = []  # what --overwrite has yet to remove

    def check(self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False) -> bool:
        """Whether there is a job to go on with. Raises TersorError where `out` is taken; changes nothing on disk.

        redo: go on with a finished result of the same job too.
        """
        if self.out.exists() and not self.out.is_dir():
            raise TersorError(f"{self.out} is a file; give a directory")
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise TersorError(
                f"{self.folder} is a link or a file, not the folder of a job; remove it, or give another --out"
            )
        with disk_errors(self.out):
            if overwrite:
                if self.out.exists() and any(self.out.iterdir()):
                    check_replaceable(self.out, self._own(), self.inputs, kept="--overwrite does not empty it")
                return False
            return self._check_going_on(fingerprint, redo=redo)

    def _check_going_on(self, fingerprint: Mapping[str, str], *, redo: bool) -> bool:
        journal = self._read_journal()
        finished = self._is_result_of(fingerprint)
        if journal is None and not (finished and redo):
            if not self.out.exists() or all(path == self.folder for path in self.out.iterdir()):
                return False
            if finished:
                raise FinishedError(
                    f"{self.out} holds the finished result of this very command; --redo '*' or --overwrite makes it again"
                )
            raise TersorError(f"{self.out} exists and is not empty; give another directory or --overwrite")
        if journal is not None:
            old = journal["fingerprint"]
            changed = [key for key in fingerprint if fingerprint[key] != old.get(key)]
            if changed:
                raise TersorError(
                    f"{self.out} holds an unfinished job with another {' and '.join(changed)}; "
                    "give the same command to finish it, or --overwrite to start anew"
                )
        self._refuse_strangers(self._own())
        return True

    def _refuse_strangers(self, own: Collection[str]) -> None:
        """Raise TersorError for files of the user's that could be written over. Those in the job's own folder are left alone."""
        for name in strangers(self.out, own):
            if not name.startswith(f"{JOB_FOLDER}/"):
                raise TersorError(
                    f"{self.out} holds {name}, which tersor did not write; move it away and give the same command again"
                )

    def start(self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False) -> None:
        """Begin, or go on with what an earlier run of the same command left. Raises as `check` does, and where the model has
        changed since the earlier run."""
        going_on = self.check(fingerprint, overwrite=overwrite, redo=redo)
        journal = self._read_journal() if going_on else None
        self._fingerprint = dict(fingerprint)
        with disk_errors(self.out):
            if journal is not None:
                self._check_source(journal.get("sources"))
                self._emptying, self._files = list(journal.get("emptying") or ()), list(journal.get("files") or ())
                self._take_over(journal)
            elif going_on:
                self._check_result_source()
                self._files = sorted(name for name in self._own() if not name.startswith(f"{JOB_FOLDER}/"))
            elif self.out.exists() and any(self.out.iterdir()):
                self._emptying = sorted(self._own() - {JOURNAL})
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_half_written()
            self._write_journal()  # a run that is killed while it empties `out` goes on from here
            if self._emptying:
                remove_own(self.out, self._emptying, keep={JOURNAL})
                self._emptying = []
                self._write_journal()

    def _check_source(self, recorded: Any) -> None:
        """Raise TersorError where a tensor has changed since the earlier run. Reads the tensors that this run has not read
        yet."""
        for name, digest in (recorded if isinstance(recorded, dict) else {}).items():
            if name not in self.seen.hashes and name in self.source.shard_of:
                self.source.read([name])
            if self.seen.hashes.get(name) != digest:
                raise TersorError(
                    f"{self.out} holds an unfinished job, and the model's {name} has changed since; --overwrite starts anew"
                )

    def _check_result_source(self) -> None:
        """The same check for a finished result, some of whose blocks will be solved again."""
        self._read_all()
        if (record_of(self.out) or {}).get("source") != self.seen.whole():
            raise TersorError(f"{self.out} was made when the model had other weights; --overwrite makes it anew")

    def _read_all(self) -> None:
        for name in self.source.shard_of:
            if name not in self.seen.hashes:
                self.source.read([name])
        self.seen.check()

    def _take_over(self, journal: Mapping[str, Any]) -> None:
        """Take over the finished blocks of an earlier run from its journal. Their files are checked when they are read."""
        hashes = journal.get("hashes")
        hashes = hashes if isinstance(hashes, dict) else {}
        for name, rows in journal["done"].items():
            good = isinstance(hashes.get(name), str) and name in self.blocks
            good = good and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
            if good and all(isinstance(row.get("seconds", 0.0), int | float) for row in rows):
                self.done[name], self.hashes[name] = rows, hashes[name]
            else:
                self._tell_lost(name)

    def _tell_lost(self, block: str) -> None:
        self.tell(f"{block or 'the model'} in {self.folder} is not what was written there, and is solved again")

    def _remove_half_written(self) -> None:
        """Remove what a killed run was writing, and the activations that it had put on disk."""
        for path in self.folder.glob(f"{SCRATCH}*"):
            if is_plain_file(path):
                path.unlink()
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def _own(self) -> set[str]:
        """The files in `out` that are tersor's, by its records and by what this job writes.

        Where the journal is damaged, the names that can be read in it count.
        """
        own = {*own_names(self.out), *OWN_IN_JOB, *map(block_name, self.blocks)}
        journal = self.out / JOURNAL
        if is_plain_file(journal) and read_object(journal) is None:
            text = journal.read_text(encoding="utf-8", errors="replace")
            own |= {
                block_name(path.stem) for path in self.folder.glob("*.safetensors") if json.dumps(path.stem) in text
            }
        return own

    def redo(
        self, blocks: set[str], layers: Mapping[str, Mapping[str, Sequence[str]]], suffixes: Collection[str]
    ) -> None:
        """Forget these finished blocks. A finished result becomes an unfinished job that has the other blocks.

        layers: {block: {layer: the published names of its tensors, without suffix}}, for all blocks. suffixes: of these tensors.
        """
        result = self._result()
        with disk_errors(self.out):
            if not self.done and result is not None:
                self._take_apart(result, layers, suffixes)
            for block in blocks & set(self.done):
                del self.done[block], self.hashes[block]
            self._write_journal()

    def _take_apart(
        self,
        result: Mapping[str, Any],
        layers: Mapping[str, Mapping[str, Sequence[str]]],
        suffixes: Collection[str],
    ) -> None:
        reports = {row["name"]: {**row, "seconds": 0.0} for row in result["layers"]}
        shards = [load_file(path) for path in sorted(self.out.glob("*.safetensors"))]
        for block, linears in layers.items():
            stems = {stem for names in linears.values() for stem in names}
            names = {f"{stem}.{suffix}" for stem in stems for suffix in suffixes}
            packed = {k: t for shard in shards for k, t in shard.items() if k in names}
            rows = [reports[name] for name in linears if name in reports]
            if block_hash(packed, rows) == result["blocks"].get(block):
                self.write_block(block, packed, rows)
            else:
                self._tell_lost(block)

    def _result(self) -> dict[str, Any] | None:
        return record_of(self.out)

    def mark(self, name: str) -> str | None:
        """A mark of the unfinished job or finished result in `out`; None where there is none."""
        found = (read_object(self.out / JOURNAL) or self._result() or {}).get("fingerprint", {})
        return found.get(name) if isinstance(found, dict) else None

    def _is_result_of(self, fingerprint: Mapping[str, str]) -> bool:
        result = self._result()
        return result is not None and result.get("fingerprint") == dict(fingerprint)

    def write_block(self, name: str, tensors: Mapping[str, Tensor], reports: list[dict[str, Any]]) -> None:
        with disk_errors(self.out):
            own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            self._save(own, self._block_file(name))
            self.hashes[name] = block_hash(own, reports)
            self.done[name] = reports
            self._write_journal()

    def read_block(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished block. Where its file has changed, it no longer counts as finished, and None is returned."""
        path = self._block_file(name)
        try:
            tensors = load_file(path) if is_plain_file(path) else {}
            if tensors and block_hash(tensors, self.done[name]) == self.hashes[name]:
                return tensors
        except (SafetensorError, OSError, ValueError):
            pass
        del self.done[name], self.hashes[name]
        self._tell_lost(name)
        return None

    def place(
        self, source: Checkpoint, replaced: set[str], config: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Complete the directory: the tensors of `source` without those in `replaced`, its other files, and the configs. May be
        called again after an interruption.

        extra: JSON files to write beside config.json, by name. The record among them is completed.
        """
        with disk_errors(self.out):
            blocks = [self._block_file(name) for name in sorted(self.done, key=self.blocks.index)]
            rest = self.folder / "rest.safetensors"
            self._save_rest(source, [name for name in source.shard_of if name not in replaced], rest)
            self._read_all()
            parts = [*blocks, rest]
            one_file = sum(path.stat().st_size for path in parts) <= SINGLE_FILE_LIMIT
            shards = ["model.safetensors"] if one_file else [*_shard_names(len(parts)), INDEX]
            others = self._other_files(source, {"config.json", RESULT_FILE, RUN_FILE, *shards, *extra})
            self._claim({*shards, *others, *extra, "config.json", RESULT_FILE, RUN_FILE})
            if one_file:
                together = {name: piece for path in parts for name, piece in pieces_of(path).items()}
                self._splice(together, self.out / "model.safetensors")
            else:
                self._place_shards(parts)
            for relative, path in others.items():
                (self.out / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self._partial())
                settle(self._partial_path, self.out / relative)
            record = {
                **extra.get(RESULT_FILE, {}),
                "files": self._files,
                "blocks": dict(sorted(self.hashes.items())),
                "source": self.seen.whole(),
            }
            for name, content in {**extra, RESULT_FILE: record, "config.json": config}.items():
                self._write_json(content, self.out / name)

    def _other_files(self, source: Checkpoint, written: Collection[str]) -> dict[str, Path]:
        """The source's other files, by their names in it. Files of the job's own result are left out."""
        inside = self.out.resolve()
        found = {path.relative_to(source.directory).as_posix(): path for path in source.other_files()}
        return {
            name: path for name, path in found.items() if name not in written and inside not in path.resolve().parents
        }

    def _claim(self, names: Iterable[str]) -> None:
        """Record what is about to be written. Raises TersorError where the user has put such a file there."""
        self._refuse_strangers(self._own())
        self._files = sorted({*self._files, *names})
        self._write_journal()

    def seal(self) -> None:
        """Declare the result finished."""
        with disk_errors(self.out):
            own = self._own()
            (self.out / JOURNAL).unlink()
            remove_own(self.out, {name for name in own if name.startswith(f"{JOB_FOLDER}/")})
            if self.folder.exists():
                left = next(iter(self.folder.iterdir()), self.folder)
                self.tell(f"{left} is not tersor's, and stays")

    def _place_shards(self, files: list[Path]) -> None:
        weight_map, total = {}, 0
        for path, name in zip(files, _shard_names(len(files)), strict=True):
            _link(path, self.out / name)
            for tensor, piece in pieces_of(path).items():
                weight_map[tensor] = name
                total += piece.size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json(index, self.out / INDEX)

    @property
    def _partial_path(self) -> Path:
        """Where a file is written before it is renamed to its place."""
        return self.folder / "partial"

    def _partial(self) -> Path:
        """The same path, after removing what lies there: writing through a link would change another file."""
        self._partial_path.unlink(missing_ok=True)
        return self._partial_path

    def _save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write a safetensors file that is whole or absent at any moment."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        partial = self._partial()
        save_file(own, partial, metadata={"format": "pt"})
        partial.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
        settle(partial, path)

    def _save_rest(self, source: Checkpoint, names: Sequence[str], path: Path) -> None:
        """Write tensors of the source as they are, from disk to disk; pickled ones go through memory."""
        if all(source.shard_of[name].suffix == ".safetensors" for name in names):
            shards = {shard: pieces_of(shard) for shard in sorted({source.shard_of[name] for name in names})}
            self._splice({name: shards[source.shard_of[name]][name] for name in names}, path, note=self.seen.note)
        else:
            with source.mapped(names) as kept:
                self._save(kept, path)

    def _splice(
        self, pieces: Mapping[str, Piece], path: Path, *, note: Callable[[str, str], None] | None = None
    ) -> None:
        partial = self._partial()
        with partial.open("wb") as file:
            splice(pieces, file, note=note)
        settle(partial, path)

    def _write_json(self, content: Mapping[str, Any], path: Path) -> None:
        partial = self._partial()
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        settle(partial, path)

    def _block_file(self, name: str) -> Path:
        return self.out / block_name(name)

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.out / JOURNAL
        if not os.path.lexists(path):
            return None
        journal = read_object(path) or {}
        for key, kind in (("fingerprint", dict), ("done", dict), ("files", list), ("emptying", list), ("blocks", list)):
            if not isinstance(journal.get(key, [] if kind is list else None), kind):
                raise TersorError(f"{path} is damaged (no {key} in it); --overwrite starts anew")
        return journal

    def _write_journal(self) -> None:
        journal = {
            "fingerprint": self._fingerprint,
            "blocks": self.blocks,
            "files": self._files,
            "done": self.done,
            "hashes": self.hashes,
            "sources": dict(sorted(self.seen.hashes.copy().items())),  # a copy, because other threads may add to it
        }
        self._write_json({**journal, "emptying": self._emptying} if self._emptying else journal, self.out / JOURNAL)


def _shard_names(count: int) -> list[str]:
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _link(source: Path, target: Path) -> None:
    """Give a file another name, and keep the old one for a run that goes on from here. A copy where the disk has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the config, of every tensor's place, and of samples from all over each shard (64 KiB in every 16 MiB)."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in sorted(set(checkpoint.shard_of.values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, 16 * 2**20):
                file.seek(offset)
                digest.update(file.read(64 * 2**10))
    return digest.hexdigest()
