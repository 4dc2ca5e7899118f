"""Write a compressed checkpoint block by block, so that a job that is stopped at any moment loses little.

While the job runs, OUT holds one folder, `.tersor-job`: `journal.json` (what is being made from what, and which blocks are done)
and one safetensors file a block. Every file appears by a rename, so it is whole or absent. `place` puts the shards, config and
other files beside the folder; `seal` makes the result a finished one, by removing first the journal, then the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.checkpoint.source import INDEX, JOB_FOLDER, Checkpoint
from tersor.checkpoint.splice import Piece, pieces_of, splice
from tersor.errors import TersorError

SINGLE_FILE_LIMIT = 5 * 10**9  # larger results keep one shard a block
RESULT_FILE = "tersor.json"


class Job:
    """An unfinished result in `out`. `done` maps the blocks that are finished to what was reported of them."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / JOB_FOLDER
        self.done: dict[str, list[dict[str, Any]]] = {}
        self._fingerprint: dict[str, str] = {}
        self._emptying = False  # whether `out` still holds what --overwrite is to remove

    def check(self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False) -> bool:
        """Whether there is a job to go on with. Raises TersorError where `out` is taken; changes nothing on disk.

        redo: a finished result of the same job counts as one to go on with.
        """
        if self.out.exists() and not self.out.is_dir():
            raise TersorError(f"{self.out} is a file; give a directory")
        journal = self._read_journal()
        if journal is not None and not overwrite:
            old = journal["fingerprint"]
            changed = [key for key in fingerprint if fingerprint[key] != old.get(key)]
            if changed:
                raise TersorError(
                    f"{self.out} holds an unfinished job with another {' and '.join(changed)}; "
                    "give the same command to finish it, or --overwrite to start anew"
                )
            return True
        finished = not overwrite and self._is_result_of(fingerprint)
        if finished and redo:
            return True
        if self.out.exists() and any(path != self.folder for path in self.out.iterdir()):
            if finished:
                raise TersorError(
                    f"{self.out} holds the finished result of this very command; --redo '*' or --overwrite makes it again"
                )
            if not overwrite:
                raise TersorError(f"{self.out} exists and is not empty; give another directory or --overwrite")
            if not self.folder.exists() and not (self.out / "config.json").exists():
                raise TersorError(
                    f"{self.out} is no model directory, so --overwrite does not empty it; remove it yourself"
                )
        return False

    def start(self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False) -> None:
        """Begin, or go on with what an earlier run of the same command left. Raises as `check` does."""
        going_on = self.check(fingerprint, overwrite=overwrite, redo=redo)
        journal = self._read_journal() if going_on else None
        self._fingerprint = dict(fingerprint)
        with disk_errors(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            if journal is not None:
                self._remove_half_written()
                self._emptying = bool(journal.get("emptying"))
                self.done = {name: rows for name, rows in journal["done"].items() if self._block_file(name).exists()}
            else:
                self._emptying = not going_on
            self._write_journal()  # from here on, a run that is killed while it empties `out` is gone on with
            if self._emptying:
                self._empty()
                self._emptying = False
                self._write_journal()

    def _remove_half_written(self) -> None:
        """Files that a killed run was writing: safetensors begins them under names of its own."""
        for path in self.folder.glob(".tmp*"):
            path.unlink()

    def _empty(self) -> None:
        """Remove all that is in `out` but the journal."""
        journal = self.folder / "journal.json"
        for path in [*self.out.iterdir(), *self.folder.iterdir()]:
            if path.is_dir() and not path.is_symlink() and path != self.folder:
                shutil.rmtree(path)
            elif path not in (self.folder, journal):
                path.unlink()

    def redo(self, blocks: set[str], layers: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Forget these finished blocks. Where the whole result is finished, its other blocks become those of an unfinished job.

        layers: {block: {layer: the published names under which its tensors lie}}, for all blocks.
        """
        result = self._result()
        with disk_errors(self.out):
            if not self.done and result is not None:
                reports = {row["name"]: {**row, "seconds": 0.0} for row in result["layers"]}
                shards = [load_file(path) for path in sorted(self.out.glob("*.safetensors"))]
                for block, linears in layers.items():
                    stems = {stem for names in linears.values() for stem in names}
                    mine = {k: t for shard in shards for k, t in shard.items() if k.rpartition(".")[0] in stems}
                    packed = {k: t for k, t in mine.items() if not k.endswith((".bias", ".weight"))}
                    self.write_block(block, packed, [reports[name] for name in linears])
            for block in blocks & set(self.done):
                del self.done[block]
            self._write_journal()
            (self.folder / "rest.safetensors").unlink(missing_ok=True)

    def _result(self) -> dict[str, Any] | None:
        path = self.out / RESULT_FILE
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def mark(self, name: str) -> str | None:
        """What the unfinished job or finished result in `out` says of itself, None where there is none."""
        found = (self._read_journal() or self._result() or {}).get("fingerprint", {})
        return found.get(name) if isinstance(found, dict) else None

    def _is_result_of(self, fingerprint: Mapping[str, str]) -> bool:
        result = self._result()
        return result is not None and result.get("fingerprint") == dict(fingerprint)

    def write_block(self, name: str, tensors: Mapping[str, Tensor], reports: list[dict[str, Any]]) -> None:
        with disk_errors(self.out):
            self._save(tensors, self._block_file(name))
            self.done[name] = reports
            self._write_journal()

    def read_block(self, name: str) -> dict[str, Tensor]:
        return load_file(self._block_file(name))

    def place(
        self, source: Checkpoint, replaced: set[str], config: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Complete the directory: the tensors of `source` but for those in `replaced`, its other files, and the configs.

        extra: JSON files to write beside config.json, by name. Placed again after an interruption, they are the same.
        """
        with disk_errors(self.out):
            blocks = [self._block_file(name) for name in self.done]
            rest = self.folder / "rest.safetensors"
            if not rest.exists():
                self._save_rest(source, [name for name in source.shard_of if name not in replaced], rest)
            if sum(path.stat().st_size for path in [*blocks, rest]) <= SINGLE_FILE_LIMIT:
                together = {name: piece for path in [*blocks, rest] for name, piece in pieces_of(path).items()}
                self._splice(together, self.out / "model.safetensors")
            else:
                self._place_shards([*blocks, rest])
            for path in source.other_files():
                relative = path.relative_to(source.directory)
                if relative.as_posix() not in ("config.json", RESULT_FILE, *extra):
                    (self.out / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self._partial)
                    _settle(self._partial, self.out / relative)
            for name, content in {**extra, "config.json": config}.items():
                self._write_json(content, self.out / name)

    def seal(self) -> None:
        """Declare the result finished."""
        with disk_errors(self.out):
            (self.folder / "journal.json").unlink()
            shutil.rmtree(self.folder)

    def _place_shards(self, files: list[Path]) -> None:
        weight_map, total = {}, 0
        for n, path in enumerate(files, 1):
            shard = self.out / f"model-{n:05d}-of-{len(files):05d}.safetensors"
            _link(path, shard)
            for name, piece in pieces_of(shard).items():
                weight_map[name] = shard.name
                total += piece.size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json(index, self.out / INDEX)

    @property
    def _partial(self) -> Path:
        """Where a file is written before it is renamed to its place."""
        return self.folder / "partial"

    def _save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """A safetensors file that is whole or absent."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        self._partial.unlink(missing_ok=True)
        save_file(own, self._partial, metadata={"format": "pt"})
        self._partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        _settle(self._partial, path)

    def _save_rest(self, source: Checkpoint, names: Sequence[str], path: Path) -> None:
        """Tensors of the source as they are: from disk to disk, but for pickled ones."""
        if all(source.shard_of[name].suffix == ".safetensors" for name in names):
            shards = {shard: pieces_of(shard) for shard in sorted({source.shard_of[name] for name in names})}
            self._splice({name: shards[source.shard_of[name]][name] for name in names}, path)
        else:
            with source.mapped(names) as kept:
                self._save(kept, path)

    def _splice(self, pieces: Mapping[str, Piece], path: Path) -> None:
        with self._partial.open("wb") as file:
            splice(pieces, file)
        _settle(self._partial, path)

    def _write_json(self, content: Mapping[str, Any], path: Path) -> None:
        self._partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _settle(self._partial, path)

    def _block_file(self, name: str) -> Path:
        return self.folder / f"{name or 'model'}.safetensors"

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / "journal.json"
        if not path.is_file():
            return None
        try:
            journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return {**journal, **{key: dict(journal[key]) for key in ("fingerprint", "done")}}
        except (ValueError, KeyError, TypeError) as error:
            raise TersorError(f"{path} is damaged ({error}); --overwrite starts anew") from None

    def _write_journal(self) -> None:
        journal = {"fingerprint": self._fingerprint, "done": self.done}
        self._write_json({**journal, "emptying": True} if self._emptying else journal, self.folder / "journal.json")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _settle(partial: Path, path: Path) -> None:
    """Rename only what has reached the disk: after a power cut a file is the old one or the new one, never an empty one."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _link(source: Path, target: Path) -> None:
    """Another name for a file, which is kept for a run that goes on from here; a copy where the disk knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A failure to write is a TersorError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise TersorError(
                f"the disk of {out} is full; the finished blocks are kept: make room and give the same command again"
            ) from None
        raise TersorError(f"cannot write to {out}: {error}") from None


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
