"""A checkpoint directory or GGUF file, opened lazily: its config, its tensors by name (memory-mapped), its other files."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.checkpoint import published
from tersor.checkpoint.gguf_read import GGUFFile, open_gguf
from tersor.checkpoint.hashes import Seen, bytes_of, tensor_hash
from tersor.checkpoint.names import JOB_FOLDER, is_gguf, local_path
from tersor.errors import TersorError
from tersor.formats.weight_files import PICKLE_ENDINGS, SAFETENSORS, weight_files
from tersor.untrusted import (
    check_config,
    first_words,
    inside,
    no_special_files,
    read_json,
    read_json_object,
    regular_file,
)

STEPS = "tersor_steps"  # in config.json: the methods of a recipe of several steps
INDEX = SAFETENSORS[1]
PICKLES = tuple(f"*{ending}" for ending in PICKLE_ENDINGS)
NAMES = {  # torch's dtypes by the names that safetensors has for them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


class _Slice:
    """A safetensors slice that copies its values out of the mapped file, so that the file can be closed."""

    def __init__(self, piece: Any) -> None:
        self.get_shape, self.get_dtype, self._piece = piece.get_shape, piece.get_dtype, piece

    def __getitem__(self, index: Any) -> Tensor:
        try:
            values: Tensor = self._piece[index].clone()
        except (SafetensorError, RuntimeError, ValueError, AttributeError) as error:
            raise TersorError(f"a tensor of {self.get_dtype()} cannot be read: {first_words(error)}") from None
        return values


class _WatchedSlice:
    """A slice that notes its hash when it is read whole."""

    def __init__(self, piece: Any, name: str, seen: Seen) -> None:
        self.get_shape, self.get_dtype = piece.get_shape, piece.get_dtype
        self._piece, self._name, self._seen = piece, name, seen

    def __getitem__(self, index: Any) -> Tensor:
        values: Tensor = self._piece[index]
        if index is Ellipsis:
            found = tensor_hash(self.get_dtype(), self.get_shape(), bytes_of(values))
            self._seen.note(self._name, found.hexdigest())
        return values


class _PickledTensor:
    """A tensor of a pickled shard, with a slice's interface."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return NAMES[self._tensor.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index].clone()


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Nothing but headers is read before a tensor is asked for."""

    directory: Path  # or a GGUF file
    config: dict[str, Any]  # config.json
    shard_of: dict[str, Path]  # the file that holds each tensor
    gguf: GGUFFile | None = None
    seen: Seen | None = None  # notes the hashes of tensors as they are read
    origin: Path | None = None  # of a model that was converted from its published layout: where the user has it
    name: str = ""  # what the user calls it

    def __str__(self) -> str:
        return self.name or str(self.directory)

    @contextmanager
    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The named tensors as safetensors slices. A slice is read when it is indexed, as `slice[...]`."""
        names = list(names)
        if self.gguf is not None:
            yield {name: self.gguf.tensors[name] for name in names}
            return
        with ExitStack() as stack:
            shards = {self.shard_of[name] for name in names}
            opened = {
                path: _unpickled(path) if _is_pickle(path) else stack.enter_context(safe_open(path, framework="pt"))
                for path in sorted(shards)
            }
            slices: dict[str, Any] = {
                name: _PickledTensor(shard[name]) if isinstance(shard, dict) else _Slice(shard.get_slice(name))
                for name, shard in ((name, opened[self.shard_of[name]]) for name in names)
            }
            if self.seen is not None:
                slices = {name: _WatchedSlice(piece, name, self.seen) for name, piece in slices.items()}
            yield slices

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in memory of their own."""
        with self.tensors(names) as slices:
            return {name: piece[...] for name, piece in slices.items()}

    @contextmanager
    def mapped(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """The named tensors, mapped from their files, for copying from disk to disk without holding them in memory."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            found = {}
            for name in names:
                path = self.shard_of[name]
                if path not in opened:
                    opened[path] = (
                        _unpickled(path) if _is_pickle(path) else stack.enter_context(safe_open(path, framework="pt"))
                    )
                shard = opened[path]
                found[name] = shard[name] if isinstance(shard, dict) else shard.get_tensor(name)
            yield found

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        with self.tensors([name]) as slices:
            return tuple(slices[name].get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the headers."""
        with self.tensors(self.shard_of) as slices:
            return {name: tuple(each.get_shape()) for name, each in slices.items()}

    def other_files(self) -> list[Path]:
        """Every file that is not a tensor shard, an index or hidden: tokenizer, templates, licence, ..."""
        shards = set(self.shard_of.values())
        return sorted(
            path
            for path in self.directory.rglob("*")
            if path.is_file()
            and path not in shards
            and not path.name.endswith(".index.json")
            and path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
            and not any(part.startswith(".") for part in path.relative_to(self.directory).parts)
        )

    def bytes_of_tensors(self) -> dict[str, int]:
        """What each tensor takes on disk, from the headers."""
        if self.gguf is not None:
            return {name: each.bytes for name, each in self.gguf.tensors.items()}
        with self.tensors(self.shard_of) as slices:
            return {name: prod(each.get_shape()) * WIDTH.get(each.get_dtype(), 1) for name, each in slices.items()}

    def bytes_in_memory(self, dtype: torch.dtype) -> int:
        """What all tensors take once loaded, from the headers: plain ones in `dtype`, integers (of packed layers) as they
        are."""
        with self.tensors(self.shard_of) as slices:
            return sum(
                prod(each.get_shape()) * (WIDTH[each.get_dtype()] if each.get_dtype() in INTEGERS else dtype.itemsize)
                for each in slices.values()
            )

    def size(self) -> int:
        """Bytes of all tensor files."""
        return sum(path.stat().st_size for path in set(self.shard_of.values()))


Openable = str | Path | Checkpoint  # a model by its name, or opened already


def open_checkpoint(model: Openable, *, allow_pickle: bool = False, unfinished: bool = False) -> Checkpoint:
    """Open a directory, a GGUF file, a built-in model or a hub repository. Raises TersorError where it is none of these.

    An opened one is given back as it is, so that a model is opened once and handed on.
    allow_pickle: read pickled weights where there are no safetensors, with `weights_only`, so that nothing in them runs.
    unfinished: allow a result that is not finished; for the job that writes it.
    """
    if isinstance(model, Checkpoint):
        return model
    directory = resolve(model, allow_pickle=allow_pickle)
    if is_gguf(directory):
        found = open_gguf(directory)
        return Checkpoint(directory, found.config, dict.fromkeys(found.tensors, directory), found, name=str(model))
    if (directory / JOB_FOLDER / "journal.json").exists() and not unfinished:
        raise TersorError(f"{directory} holds an unfinished job; run its command again to finish it")
    config_file = directory / "config.json"
    no_special_files(directory)
    if not config_file.is_file():
        raise TersorError(f"{directory} is not a model: it has no config.json")
    config = read_json_object(config_file)
    pickled = published.named_by(config) is not None and allow_pickle and published.is_pickled(directory)
    shards = {} if pickled else _shards(directory, config, allow_pickle)
    checkpoint = Checkpoint(directory, config, shards, name=str(model))
    size = published.weight_bytes(directory) if pickled else checkpoint.size()
    check_config(config_file, config, tensors=len(shards), size=size)
    if (ours := published.converted(directory, config, None if pickled else checkpoint.shapes)) is not None:
        return replace(open_checkpoint(ours), origin=directory, name=str(model))
    if pickled:
        checkpoint = replace(checkpoint, shard_of=_shards(directory, config, allow_pickle))
        check_config(config_file, config, tensors=len(checkpoint.shard_of), size=checkpoint.size())
    return checkpoint


def resolve(model: Openable, *, allow_pickle: bool = False) -> Path:
    """The local directory of a model, or its GGUF file; downloads a hub repository where the name has that form."""
    if isinstance(model, Checkpoint):
        return model.directory
    found = local_path(str(model))
    return _download(str(model), allow_pickle) if found is None else found


def _download(name: str, allow_pickle: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [
        "*.safetensors",
        *(PICKLES if allow_pickle else ()),
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "*.py",
        "*.md",
        "LICENSE*",
    ]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except HFValidationError as error:
        raise TersorError(f"{name} is neither a directory nor a hub name: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TersorError(f"{name} is no directory here and could not be had from the hub: {reason}") from None


def _shards(directory: Path, config: dict[str, Any], allow_pickle: bool) -> dict[str, Path]:
    """The file that holds each tensor of the model."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        inside(directory, named)
    chosen = weight_files(directory, explicit=named if isinstance(named, str) else None)
    if chosen is None:
        raise TersorError(f"{directory} holds no *.safetensors file and no pickled weights ({', '.join(PICKLES)})")
    if chosen.is_pickled and not allow_pickle:
        first = chosen.index or chosen.files[0]
        raise TersorError(
            f"{directory} holds only pickled weights ({first.name}), which can run code when opened; "
            "`tersor quantize` and `tersor compress` read them without running any with --allow-pickle, tersor.load with "
            "allow_pickle=True; or save the model as safetensors first"
        )
    weight_map = {} if chosen.index is None else _read_index(chosen.index)
    paths = chosen.files if chosen.index is None else sorted({inside(directory, name) for name in weight_map.values()})
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise TersorError(f"{directory} lacks {', '.join(missing)}, which its index names")
    shard_of: dict[str, Path] = {}
    for path in paths:
        for name in _names_in(path):
            if name in weight_map and inside(directory, weight_map[name]) != path:
                continue  # the index has a newer tensor of this name
            if name in shard_of:
                raise TersorError(
                    f"{directory}: {shard_of[name].name} and {path.name} both hold {name}; leave one of them there, or "
                    "call the model's weights model.safetensors"
                )
            shard_of[name] = path
    lost = sorted(set(weight_map) - set(shard_of))
    if lost:
        raise TersorError(f"{directory}: the index names {lost[0]}, which no shard holds")
    return shard_of


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: the shard that holds it}"""
    try:
        weight_map = dict(read_json(path)["weight_map"].items())
        for file in weight_map.values():
            inside(path.parent, file)
        return weight_map
    except (TersorError, KeyError, TypeError, AttributeError) as error:
        raise TersorError(f"{path} is not a {path.name.split('.')[1]} index: {error}") from None


def _names_in(path: Path) -> list[str]:
    if _is_pickle(path):
        return list(_unpickled(path))
    regular_file(path)
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise TersorError(f"{path} cannot be read as safetensors: {error}") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped rather than read where its format allows."""
    regular_file(path)
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle raise errors of any kind
        kind = "" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: "
        raise TersorError(f"{path} cannot be read as weights only: {kind}{first_words(error)}") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise TersorError(f"{path} holds something else than tensors by name")
    if (bad := next((name for name in found if not isinstance(name, str)), None)) is not None:
        raise TersorError(f"{path} holds a tensor under {bad!r}, which is no name")
    for name, tensor in found.items():
        check_dense(tensor, f"{name} of {path}")
    return found


def check_dense(tensor: Tensor, what: str) -> None:
    """Raise TersorError for a pickled tensor of a kind that weights do not have, or that claims to be larger than the memory
    behind it."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in NAMES:
        raise TersorError(f"{what} is {tensor.dtype}, {tensor.layout} on {tensor.device}: no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TersorError(f"{what} says it is {tuple(tensor.shape)}; the file holds fewer values")


def _is_pickle(path: Path) -> bool:
    return path.suffix in PICKLE_ENDINGS


def torch_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config says its weights have (float32 where it says none)."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    name = config.get("dtype") or config.get("torch_dtype") or (text or {}).get("dtype") or "float32"
    known = {str(each).removeprefix("torch."): each for each in NAMES if each.is_floating_point}
    dtype = known.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise TersorError(f"config.json names an unknown dtype {name!r}; known: {', '.join(known)}")
    return dtype
