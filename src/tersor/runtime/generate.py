"""Generate text with a causal language model: transformers' own generation loop, streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.source import open_checkpoint
from tersor.errors import TersorError


def stream(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are made. temperature 0 takes the likeliest token every time.

    Raises TersorError where the model cannot generate, has no tokenizer, or the prompt leaves no room.
    """
    directory = open_checkpoint(model).directory
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise TersorError(f"{directory} has no tokenizer, so it cannot read a prompt")
    module = load(directory, dtype=dtype, device=device)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise TersorError("the prompt is empty; give at least one token to continue")
    yield from stream_tokens(module, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def stream_tokens(
    module: nn.Module, tokenizer: Any, ids: torch.Tensor, *, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """As `stream`, for a module in memory and token ids [1, tokens]."""
    from transformers import TextIteratorStreamer

    config = getattr(module, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not hasattr(module, "generate") or not getattr(module, "can_generate", lambda: False)():
        raise TersorError(f"{type(module).__name__} is no model that generates text")
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise TersorError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the model's {positions} positions"
        )
    if config is not None and hasattr(config, "use_cache"):
        config.use_cache = True
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []
    ids = ids.to(next(module.parameters()).device)

    def work() -> None:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        try:
            module.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
        except BaseException as error:
            failed.append(error)
            streamer.end()  # type: ignore[no-untyped-call]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
