"""Perplexity of a causal language model on a text: exp of the mean negative log-likelihood of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import resolve
from tersor.data.text import builtin_text, read_text
from tersor.errors import TersorError


@dataclass(frozen=True)
class Perplexity:
    """perplexity over `tokens` predicted tokens in `windows` windows of `seq_len` tokens."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int

    def __float__(self) -> float:
        return self.perplexity


def perplexity(
    model: str | Path | nn.Module,
    text: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """The whole text is tokenized as one string and cut into windows of `seq_len` tokens without overlap (what is left over is
    dropped); in each window tokens 2 .. n are predicted. This is the GPTQ paper's protocol, there with 2048 tokens.

    model: a name or directory, or a module that returns `.logits`. text: a path to a text file (.gz too), "builtin" (also None),
    or token ids [tokens]. A module needs `tokenizer` unless ids are given. Raises TersorError where the text is too short.
    """
    if isinstance(model, nn.Module):
        module = model
    else:
        directory = resolve(model)
        if not isinstance(text, Tensor) and tokenizer is None:
            tokenizer = load_tokenizer(directory)
        module = load(directory, dtype=dtype, device=device)
    ids = text if isinstance(text, Tensor) else _tokens(text, tokenizer)
    positions = positions_of(module)
    if positions is not None and seq_len > positions:
        raise TersorError(f"seq_len {seq_len} is more than the {positions} positions that the model has")
    if seq_len < 2:
        raise TersorError(f"seq_len {seq_len} leaves nothing to predict; use at least 2")
    count = len(ids) // seq_len
    if count == 0:
        raise TersorError(f"the text has {len(ids)} tokens, less than one window of {seq_len}; use a shorter seq_len")
    if max_windows is not None and max_windows < 1:
        raise TersorError(f"max_windows {max_windows} leaves nothing to evaluate; use at least 1")
    if max_windows is not None:
        count = min(count, max_windows)
    windows = ids[: count * seq_len].view(count, seq_len)
    where = next(module.parameters(), torch.empty(0)).device
    total = 0.0
    module.eval()
    with torch.no_grad():
        for n, window in enumerate(windows):
            inputs = window[None].to(where)
            output = module(input_ids=inputs)
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor) or logits.shape[:2] != inputs.shape:
                raise TersorError("perplexity needs a causal language model that returns logits for every token")
            total += float(nn.functional.cross_entropy(logits[0, :-1].float(), inputs[0, 1:], reduction="sum"))
            if progress is not None:
                progress("evaluating", n + 1, count)
    predicted = count * (seq_len - 1)
    mean = total / predicted
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, predicted, count, seq_len)


def _tokens(text: str | Path | None, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise TersorError(
            "the model has no tokenizer: give token ids as a tensor, or images to a classifier (--images)"
        )
    content = builtin_text("evaluation") if text is None or text == "builtin" else read_text(text)
    ids: Tensor = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids
