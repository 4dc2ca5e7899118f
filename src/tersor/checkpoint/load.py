"""`tersor.load`: a checkpoint of any layout as a module that is ready to be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.byte_tokenizer import ByteTokenizer
from tersor.checkpoint.gguf_read import open_gguf
from tersor.checkpoint.gguf_tokenizer import tokenizer_from
from tersor.checkpoint.into import load_into
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.preprocessing import PREPROCESSOR
from tersor.checkpoint.published import checkpoint_as
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.devices import DType, pick_device
from tersor.errors import TersorError
from tersor.layers.quantized_linear import prepare_layers
from tersor.untrusted import first_words, pretrained, read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load(
    model: Openable,
    *,
    variant: str | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    into: nn.Module | None = None,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load a model: a directory, a hub name, a built-in name, a GGUF file or an opened checkpoint, original or quantized (gptq,
    gptq_v2, compressed-tensors, awq, gguf).

    Quantized layers stay packed. Models of `tersor.models` are also read in the layout of their official checkpoints.
    variant: which model a published file or folder without a config.json is (`tersor models` lists the names).
    dtype: "auto" (float32 on a CPU, else the checkpoint's own), "float16", "bfloat16" or "float32", or such a torch.dtype.
    device: "auto" (the GPU where there is one), "cpu", "cuda", "cuda:1".
    into: a module of the same structure to fill in place, for a class of your own that was compressed in memory. It keeps its
    dtype and device.
    allow_pickle: read pickled weights where there are no safetensors, without running anything in them.
    Raises TersorError where the directory is no model or lacks tensors.
    """
    if variant is not None:
        model = checkpoint_as(model.directory if isinstance(model, Checkpoint) else model, variant)
    if into is not None:
        return load_into(open_checkpoint(model, allow_pickle=allow_pickle), into)
    where = pick_device(device)
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    return load_opened(checkpoint, dtype=compute_dtype(checkpoint, where, dtype), device=where)


def load_opened(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module of a checkpoint that is open, ready to be called."""
    lazy = LazyModel(checkpoint, dtype=dtype, device=device, packed=True)
    module = lazy.load_all().to(device)  # moves computed buffers too, which no checkpoint holds
    prepare_layers(module)
    _read_generation_config(checkpoint.directory, module)
    return module


def _read_generation_config(directory: Path, module: Any) -> None:
    """Give the module its makers' settings for generating text: end tokens, sampling."""
    path = directory / "generation_config.json"
    if not path.is_file() or getattr(module, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # the file may hold anything
        raise TersorError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    ends = found.eos_token_id
    if ends is None:
        found.eos_token_id = module.generation_config.eos_token_id
    elif not all(isinstance(each, int) for each in (ends if isinstance(ends, list) else [ends])):
        raise TersorError(f"{path}: eos_token_id is {ends!r}; expected a token's number or a list of them")
    module.generation_config = found


def check_tokens(module: Any, ids: Tensor, tokenizer: Any = None) -> None:
    """Raise TersorError, naming the token, where a token has no row in the model's embedding. Tokens that stand for images or
    sound may have none, because the model replaces them."""
    try:
        embedding: Any = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model, or one without an embedding
        return
    rows = getattr(embedding, "num_embeddings", None)
    if not isinstance(rows, int) or not ids.numel() or ids.is_floating_point():
        return
    outside = sorted(set(ids[(ids < 0) | (ids >= rows)].tolist()))
    if not outside:
        return
    config: Any = getattr(module, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    replaced = {
        value
        for key, value in said.items()
        if key.startswith(("image", "video", "audio", "boi", "eoi")) and key.endswith(("_token_id", "_token_index"))
    }
    for token in outside:
        if token not in replaced:
            name = None if tokenizer is None or token < 0 else tokenizer.convert_ids_to_tokens(int(token))
            called = f"token {token}" if name is None else f"token {token} ({name!r})"
            raise TersorError(
                f"{called} has no row in the model's embedding of {rows} rows: the tokenizer is another model's, or the "
                "embedding was not resized when tokens were added (resize_token_embeddings in transformers)"
            )


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds files of a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model directory or GGUF file, or None where it has none. For a model of `tersor train` it is the one
    that the model was trained with."""
    if directory.suffix == ".gguf" and directory.is_file():
        fields = open_gguf(directory).fields
        try:
            return tokenizer_from(fields, str(directory))
        except TersorError:
            raise
        except Exception as error:  # the tokenizers library raises Rust's errors as a bare Exception
            raise TersorError(f"the tokenizer of {directory} cannot be loaded: {first_words(error)}") from error
    if has_tokenizer(directory):
        return named_tokenizer(directory)
    said = read_json_object(directory / PREPROCESSOR) if (directory / PREPROCESSOR).is_file() else {}
    trained_with = said.get("tokenizer")
    return named_tokenizer(trained_with) if isinstance(trained_with, str) else None


def named_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a directory or hub name, or "bytes". Raises TersorError where there is none."""
    if name == "bytes":
        return ByteTokenizer()
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, name, "tokenizer")
