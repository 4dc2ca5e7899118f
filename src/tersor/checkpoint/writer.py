"""Write a compressed checkpoint block by block, so that a job that is stopped at any moment loses at most one block.

While the job runs, OUT holds one folder, `.tersor-job`: `journal.json` (what is being made from what, and which blocks are done)
and one safetensors file a block. Every file appears by a rename, so it is whole or absent. `finish` puts the shards, config and
other files in place and removes the folder.
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
from tersor.errors import TersorError

SINGLE_FILE_LIMIT = 5 * 10**9  # larger results keep one shard a block
RESULT_FILE = "tersor.json"


class Job:
    """An unfinished result in `out`. `done` maps the blocks that are finished to what was reported of them."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / JOB_FOLDER
        self.done: dict[str, list[dict[str, Any]]] = {}
        self._fingerprint: dict[str, str] = {}

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
        if redo and not overwrite and self._finished_result(fingerprint):
            return True
        if self.out.exists() and any(self.out.iterdir()):
            if not overwrite:
                raise TersorError(f"{self.out} exists and is not empty; give another directory or --overwrite")
            if not self.folder.exists() and not (self.out / "config.json").exists():
                raise TersorError(
                    f"{self.out} is no model directory, so --overwrite does not empty it; remove it yourself"
                )
        return False

    def start(self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False) -> None:
        """Begin, or go on with what an earlier run of the same command left. Raises as `check` does."""
        if self.check(fingerprint, overwrite=overwrite, redo=redo):
            journal = self._read_journal()
            self.done = journal["done"] if journal is not None else {}
        elif self.out.exists():
            shutil.rmtree(self.out)
        self._fingerprint = dict(fingerprint)
        with _disk_errors(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_journal()

    def redo(self, blocks: set[str], layers: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Forget these finished blocks. Where the whole result is finished, its other blocks become those of an unfinished job.

        layers: {block: {layer: the published names under which its tensors lie}}, for all blocks.
        """
        result = self._result()
        with _disk_errors(self.out):
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

    def _finished_result(self, fingerprint: Mapping[str, str]) -> bool:
        result = self._result()
        return result is not None and result.get("fingerprint") == dict(fingerprint)

    def write_block(self, name: str, tensors: Mapping[str, Tensor], reports: list[dict[str, Any]]) -> None:
        with _disk_errors(self.out):
            _save(tensors, self._block_file(name))
            self.done[name] = reports
            self._write_journal()

    def read_block(self, name: str) -> dict[str, Tensor]:
        return load_file(self._block_file(name))

    def finish(
        self, source: Checkpoint, replaced: set[str], config: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Complete the directory: the tensors of `source` but for those in `replaced`, its other files, and the configs.

        extra: JSON files to write beside config.json, by name.
        """
        with _disk_errors(self.out):
            blocks = [self._block_file(name) for name in self.done]
            rest = self.folder / "rest.safetensors"
            if not rest.exists():
                kept = [name for name in source.shard_of if name not in replaced]
                _save(source.read(kept), rest)
            sizes = sum(path.stat().st_size for path in [*blocks, rest] if path.exists())
            if sizes <= SINGLE_FILE_LIMIT:
                together: dict[str, Tensor] = {}
                for path in [*blocks, rest]:
                    together.update(load_file(path))  # mapped, not read: the merge streams from disk to disk
                _save(together, self.out / "model.safetensors")
            else:
                self._place_shards([*blocks, rest])
            for path in source.other_files():
                relative = path.relative_to(source.directory)
                if relative.name not in ("config.json", RESULT_FILE, *extra):
                    (self.out / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self.out / relative)
            for name, content in {**extra, "config.json": config}.items():
                _write_json(self.out / name, content)
            shutil.rmtree(self.folder)

    def _place_shards(self, files: list[Path]) -> None:
        weight_map, total = {}, 0
        for n, path in enumerate(files, 1):
            shard = self.out / f"model-{n:05d}-of-{len(files):05d}.safetensors"
            if path.exists():
                os.replace(path, shard)
            for name, tensor in load_file(shard).items():
                weight_map[name] = shard.name
                total += tensor.numel() * tensor.element_size()
        _write_json(
            self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )

    def _block_file(self, name: str) -> Path:
        return self.folder / f"{name or 'model'}.safetensors"

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / "journal.json"
        if not path.is_file():
            return None
        try:
            journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return {key: dict(journal[key]) for key in ("fingerprint", "done")}
        except (ValueError, KeyError, TypeError) as error:
            raise TersorError(f"{path} is damaged ({error}); --overwrite starts anew") from None

    def _write_journal(self) -> None:
        _write_json(self.folder / "journal.json", {"fingerprint": self._fingerprint, "done": self.done})


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that is whole or absent."""
    partial = path.with_name(f"{path.name}.partial")
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(own, partial, metadata={"format": "pt"})
    partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
    _settle(partial, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    """Rename only what has reached the disk: after a power cut a file is the old one or the new one, never an empty one."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
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
