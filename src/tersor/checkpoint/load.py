"""`tersor.load`: a checkpoint of any layout as a module that is ready to be called."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.source import open_checkpoint


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """Load a model: a directory, a hub name or a built-in name, original or quantized (gptq, gptq_v2, compressed-tensors, awq).

    Quantized layers stay packed. dtype: "auto" (float32 on a CPU, else the checkpoint's own), "float16", "bfloat16" or
    "float32". device: "auto" (the GPU where there is one), "cpu", "cuda", "cuda:1". Raises TersorError where the directory
    is no model or lacks tensors.
    """
    where = pick_device(device)
    checkpoint = open_checkpoint(model)
    lazy = LazyModel(checkpoint, dtype=compute_dtype(checkpoint, where, dtype), device=where, packed=True)
    module = lazy.load_all()
    return module.to(where)  # computed buffers, which no checkpoint holds


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
