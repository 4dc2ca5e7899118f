"""`tersor.load`: a checkpoint of any layout as a module that is ready to be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.gguf_read import open_gguf
from tersor.checkpoint.gguf_tokenizer import tokenizer_from
from tersor.checkpoint.into import load_into
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.source import open_checkpoint
from tersor.errors import TersorError
from tersor.layers.quantized_linear import prepare_layers
from tersor.untrusted import first_words, pretrained

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto", into: nn.Module | None = None) -> nn.Module:
    """Load a model: a directory, a hub name, a built-in name or a GGUF file, original or quantized (gptq, gptq_v2,
    compressed-tensors, awq, gguf).

    Quantized layers stay packed. dtype: "auto" (float32 on a CPU, else the checkpoint's own), "float16", "bfloat16" or
    "float32". device: "auto" (the GPU where there is one), "cpu", "cuda", "cuda:1". into: a module of the same structure to
    fill in place, for a class of your own that was compressed in memory; it keeps its dtype and device. Raises TersorError
    where the directory is no model or lacks tensors.
    """
    if into is not None:
        return load_into(open_checkpoint(model), into)
    where = pick_device(device)
    checkpoint = open_checkpoint(model)
    lazy = LazyModel(checkpoint, dtype=compute_dtype(checkpoint, where, dtype), device=where, packed=True)
    module = lazy.load_all().to(where)  # with computed buffers, which no checkpoint holds
    prepare_layers(module)
    return module


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model directory or GGUF file, or None where it has none."""
    if directory.suffix == ".gguf" and directory.is_file():
        fields = open_gguf(directory).fields
        try:
            return tokenizer_from(fields, str(directory))
        except TersorError:
            raise
        except Exception as error:  # the tokenizers library raises Rust's errors as a bare Exception
            raise TersorError(f"the tokenizer of {directory} cannot be loaded: {first_words(error)}") from error
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, directory, "tokenizer")


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise TersorError(f"{device!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if picked.type not in ("cpu", "cuda"):
        raise TersorError(f"device {device!r} is none that tersor runs on; use auto, cpu, cuda or cuda:N")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise TersorError(f"device {device}: this machine has no usable CUDA GPU")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise TersorError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return picked
