"""Generate text with a causal language model, piece by piece as it comes.

`make_engine` picks how the model runs: `LlamaCPU` or `LlamaGPU` where the model fits it, else `CachedModule`. All have static
buffers of a size that is known from the start, and one method: tokens in, logits of what follows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load, load_tokenizer, pick_device
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.errors import TersorError
from tersor.layers.quantized_linear import prepare_layers
from tersor.runtime import cached_module, llama_cpu, llama_gpu
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.llama_cpu import LlamaCPU
from tersor.runtime.llama_gpu import LlamaGPU
from tersor.runtime.sampling import Sampling, choose

Engine = LlamaCPU | LlamaGPU | CachedModule
NEW_TOKENS = 1 << 24
_CONTEXT = 8  # tokens decoded again with a new one: its text depends on them (spaces, characters of several tokens)


def make_engine(module: nn.Module, *, capacity: int, batch: int = 1, take_over: bool = False) -> Engine:
    """How a module in memory runs, with a cache for `batch` sequences of `capacity` tokens.

    take_over: the module is not needed for anything else, and its weights may be let go as they are repacked.
    Raises TersorError where it cannot continue a text.
    """
    if reason := cached_module.why_not(module):
        raise TersorError(reason)
    if llama_cpu.why_not(module) is None:
        return LlamaCPU(module, capacity=capacity, batch=batch, take_over=take_over)
    if llama_gpu.why_not(module) is None:
        return LlamaGPU(module, capacity=capacity, batch=batch, take_over=take_over)
    return CachedModule(module, capacity=capacity, batch=batch)


def load_module(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """As `tersor.load`, but a bfloat16 model that LlamaCPU takes stays bfloat16 on a CPU: its values are read as they are."""
    if dtype == "auto" and pick_device(device).type == "cpu":
        config = open_checkpoint(model).config
        if (config.get("architectures") or [""])[0] in llama_cpu.FAMILY and torch_dtype(config) == torch.bfloat16:
            module = load(model, dtype="bfloat16", device=device)
            if llama_cpu.why_not(module) is not None:
                prepare_layers(module.float())
            return module
    return load(model, dtype=dtype, device=device)


def positions(module: nn.Module) -> int | None:
    """How many tokens the model has positions for, or None where it does not say."""
    found = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def check_length(module: nn.Module, prompt: int, new: int) -> None:
    """Raise TersorError where prompt and new tokens are more than the model has positions for."""
    most = positions(module)
    if most is not None and prompt + new > most:
        raise TersorError(f"a prompt of {prompt} tokens and {new} new ones are more than the model's {most} positions")


def stream(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are made. temperature 0 takes the likeliest token every time.

    Ends at the model's end-of-text token. Raises TersorError where the model cannot generate, has no tokenizer, or the prompt
    leaves no room.
    """
    if max_new_tokens > NEW_TOKENS:
        raise TersorError(f"max_new_tokens {max_new_tokens} is more than the {NEW_TOKENS:,} that a text may have")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    directory = open_checkpoint(model).directory
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise TersorError(f"{directory} has no tokenizer, so it cannot read a prompt")
    module = load_module(directory, dtype=dtype, device=device)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise TersorError("the prompt is empty; give at least one token to continue")
    check_length(module, ids.shape[1], max_new_tokens)
    engine = make_engine(module, capacity=ids.shape[1] + max_new_tokens, take_over=True)
    yield from stream_tokens(
        engine, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, end=end_tokens(module, tokenizer)
    )


def end_tokens(module: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation config, else the tokenizer's."""
    found = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def tokens(
    engine: Engine, ids: Tensor, *, max_new_tokens: int, sampling: Sampling, end: frozenset[int] = frozenset()
) -> Iterator[int]:
    """The tokens that follow ids [1, tokens], one by one, without the one that ends the text."""
    generator = torch.Generator(engine.device).manual_seed(sampling.seed)
    for _ in range(max_new_tokens):
        ids = choose(engine.forward(ids), sampling, generator)
        token = int(ids)
        if token in end:
            return
        yield token


def stream_tokens(
    engine: Engine,
    tokenizer: Any,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end: frozenset[int] = frozenset(),
) -> Iterator[str]:
    """As `stream`, for an engine and token ids [1, tokens]. The pieces are whole characters; joined, they are the text that
    decoding all tokens at once would give."""
    known, held = ids[0].tolist()[-_CONTEXT:], []
    before = tokenizer.decode(known, skip_special_tokens=True)
    for token in tokens(engine, ids, max_new_tokens=max_new_tokens, sampling=sampling, end=end):
        held.append(token)
        text = tokenizer.decode(known + held, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # the first bytes of a character: the next token may have the others
            continue
        if len(text) > len(before):
            yield text[len(before) :]
        known = (known + held)[-_CONTEXT:]
        before, held = tokenizer.decode(known, skip_special_tokens=True), []
    if held and (text := tokenizer.decode(known + held, skip_special_tokens=True)) != before:
        yield text[len(before) :]
