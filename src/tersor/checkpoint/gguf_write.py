"""Write a checkpoint as one GGUF file, for llama.cpp. Quantized layers keep their integers and steps.

Everything is checked before anything is written. First every layer gets its block type, and the metadata are made. Then one
tensor at a time is read, packed and appended. The file gets its name when it is whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.checkpoint.gguf_architecture import (
    FREQUENCIES,
    Architecture,
    architecture_of,
    frequency_divisors,
    heads_permuted,
    metadata_of,
    name_in_file,
    rows_in_file,
)
from tersor.checkpoint.gguf_header import gguf_package
from tersor.checkpoint.gguf_read import PLAIN
from tersor.checkpoint.gguf_tokenizer import tokenizer_metadata
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.devices import DType, name_of_dtype
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.formats.gguf_blocks import BLOCK_TYPES, choose_type, pack_blocks
from tersor.formats.layouts import PACKED_SUFFIXES
from tersor.progress import Progress

TYPE_OF = {dtype: name for name, dtype in PLAIN.items()}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    architecture: str
    size: int  # bytes
    types: dict[str, int]  # how many tensors each GGUF type has
    bits_before: float  # stored bits per weight of the quantized layers in the checkpoint; 0 where there are none
    bits: float  # the same in the file
    left_out: list[str]  # tensors that the architecture does not have


@dataclass(frozen=True)
class _Entry:
    """A tensor to write."""

    name: str  # in the module tree
    linear: str | None  # its layer, where that is packed
    kind: str  # its GGUF type
    shape: tuple[int, ...]
    heads: int | None


def export(
    model: str | Path,
    out: str | Path,
    *,
    dtype: DType = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model of the LLaMA family (llama, mistral, qwen2, qwen3), original or quantized, as a GGUF file.

    dtype: of matrices that are not quantized: "auto" (as stored), "float32", "float16" or "bfloat16"; vectors are float32.
    Raises TersorError, before anything is written, for a layer that no GGUF type holds exactly, and for a model that llama.cpp
    would compute differently.
    """
    gguf, target = gguf_package(), Path(out).expanduser()
    if target.suffix != ".gguf":
        raise TersorError(f"{target} does not end in .gguf, by which readers know the format")
    if target.is_dir():
        raise TersorError(f"{target} is a folder; give a file")
    if target.exists() and not overwrite:
        raise TersorError(f"{target} exists; give another file or --overwrite")
    checkpoint = open_checkpoint(model)
    if checkpoint.gguf is not None:
        raise TersorError(f"{model} is a GGUF file already")
    lazy = LazyModel(checkpoint, dtype=torch_dtype(checkpoint.config))
    config: Any = lazy.module.config
    architecture = architecture_of(type(lazy.module).__name__)
    fields = metadata_of(config, architecture)
    tokenizer = load_tokenizer(checkpoint.directory)
    if tokenizer is None:
        raise TersorError(f"{checkpoint.directory} has no tokenizer, which llama.cpp expects in the file")
    fields |= tokenizer_metadata(tokenizer, config.vocab_size)
    entries = _plan(lazy, architecture, _chosen_dtype(dtype), progress)
    divisors = frequency_divisors(config)

    types = Counter(entry.kind for entry in entries)
    main = Counter({kind: n for kind, n in types.items() if kind != "F32"} or types).most_common(1)[0][0]
    file_type = "ALL_F32" if main == "F32" else f"MOSTLY_{main}"
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_name(Path(checkpoint.directory).name)
    writer.add_file_type(int(gguf.LlamaFileType[file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in fields.items():
        _add(writer, key, value)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(name_in_file(entry.name, architecture), entry.shape, np.dtype(np.float32), count, kind)
    if divisors is not None:
        writer.add_tensor_info(FREQUENCIES, tuple(divisors.shape), np.dtype(np.float32), divisors.nbytes)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for n, entry in enumerate(entries):
                writer.write_tensor_data(_bytes_of(lazy, entry))
                if progress is not None:
                    progress("writing", n + 1, len(entries))
            if divisors is not None:
                writer.write_tensor_data(divisors.numpy())
            writer.close()
    except OSError as error:
        raise TersorError(f"cannot write {target}: {error}") from None
    before, after = _cost(lazy, entries)
    return Exported(target, architecture.name, target.stat().st_size, dict(types), before, after, lazy.unknown)


def _chosen_dtype(dtype: DType) -> torch.dtype | None:
    dtype = name_of_dtype(dtype)
    known = {"auto": None, **{str(each).removeprefix("torch."): each for each in TYPE_OF}}
    if dtype not in known:
        raise TersorError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return known[dtype]


def _plan(
    lazy: LazyModel,
    architecture: Architecture,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> list[_Entry]:
    """All tensors of the file, after checking names, block types and overflow."""
    config: Any = lazy.module.config
    packed = {lazy.parameter_of(linear): linear for linear in lazy.quantized}
    names = [
        name
        for name in lazy.module.state_dict()
        if name in packed or (name in lazy.keys_of and not (name == "lm_head.weight" and config.tie_word_embeddings))
    ]
    entries = []
    for n, name in enumerate(names):
        name_in_file(name, architecture)
        shape = tuple(lazy.module.get_parameter(name).shape)
        heads = heads_permuted(name, config.num_attention_heads, config.num_key_value_heads)
        if name in packed:
            kind = choose_type(packed[name], lazy.read_quantized(packed[name])).name
        elif len(shape) == 1:
            kind = "F32"
        else:
            kind = _dense_kind(lazy, name, dtype)
        entries.append(_Entry(name, packed.get(name), kind, shape, heads if architecture.permuted else None))
        if progress is not None:
            progress("checking", n + 1, len(names))
    return entries


def _dense_kind(lazy: LazyModel, name: str, dtype: torch.dtype | None) -> str:
    (key,) = lazy.keys_of[name]
    stored = lazy.checkpoint.read([key])[key]
    chosen = dtype or stored.dtype
    if chosen not in TYPE_OF:
        raise TersorError(f"{key} is {stored.dtype}, which GGUF has no place for here; give a --dtype")
    if not bool(torch.isfinite(stored.to(chosen)).all()):
        raise TersorError(f"{key} has values that are not finite in {chosen}; use --dtype bfloat16 or float32")
    return TYPE_OF[chosen]


def _bytes_of(lazy: LazyModel, entry: _Entry) -> Any:
    """The tensor as the file has it, its rows in the file's order."""
    values: Tensor
    if entry.linear is not None:
        values = pack_blocks(entry.linear, lazy.read_quantized(entry.linear), BLOCK_TYPES[entry.kind])
    else:
        (key,) = lazy.keys_of[entry.name]
        values = lazy.checkpoint.read([key])[key].to(PLAIN[entry.kind])
    if entry.heads is not None:
        values = values[rows_in_file(len(values), entry.heads)]
    return values.contiguous().view(torch.uint8).numpy()


def _cost(lazy: LazyModel, entries: list[_Entry]) -> tuple[float, float]:
    """Bits a weight of the quantized layers, in the checkpoint and in the file."""
    stored = lazy.checkpoint.bytes_of_tensors()
    weights = before = after = 0.0
    for entry in entries:
        if entry.linear is not None:
            count = int(np.prod(entry.shape))
            weights += count
            after += count * BLOCK_TYPES[entry.kind].bits_per_weight
            stems = lazy.quantized[entry.linear]
            before += sum(8 * stored.get(f"{stem}.{suffix}", 0) for stem in stems for suffix in PACKED_SUFFIXES)
    return (before / weights, after / weights) if weights else (0.0, 0.0)


def _add(writer: Any, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
