"""Generate text with a causal language model, piece by piece as it comes.

`make_engine` picks how the model runs: `LlamaCPU` or `LlamaGPU` where the model fits it, else `CachedModule`. All have static
buffers of a size that is known from the start, and one method: tokens in, logits of what follows out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import check_tokens, load, load_tokenizer, pick_device
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.errors import TersorError
from tersor.layers.quantized_linear import prepare_layers
from tersor.runtime import cached_module, llama_cpu, llama_gpu
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.llama_cpu import LlamaCPU
from tersor.runtime.llama_gpu import LlamaGPU
from tersor.runtime.sampling import Sampling, choose, penalize
from tersor.runtime.text_stream import TextStream

Engine = LlamaCPU | LlamaGPU | CachedModule
_TOP_K = 50  # what a generation_config.json means that samples and says nothing of it
# What a generation_config.json may ask for and tersor does not do, with the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": (),
}
NEW_TOKENS = 1 << 24


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


def check_length(module: nn.Module, prompt: int, new: int) -> None:
    """Raise TersorError where prompt and new tokens are more than the model has positions for."""
    most = positions_of(module)
    if most is not None and prompt + new > most:
        raise TersorError(f"a prompt of {prompt} tokens and {new} new ones are more than the model's {most} positions")


def stream(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    notice: Callable[[str], None] = warnings.warn,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are made. temperature 0 takes the likeliest token every time.

    What is None is as the model's generation_config.json says, or off. Ends at the model's end-of-text tokens. notice: called
    with a line where that file asks for more than tersor does. Raises TersorError where the model cannot generate, has no
    tokenizer, or the prompt leaves no room.
    """
    if max_new_tokens > NEW_TOKENS:
        raise TersorError(f"max_new_tokens {max_new_tokens} is more than the {NEW_TOKENS:,} that a text may have")
    asked = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    Sampling(**given, seed=seed)  # what is wrong in it shows before the model is loaded
    directory = open_checkpoint(model).directory
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise TersorError(f"{directory} has no tokenizer, so it cannot read a prompt")
    module = load_module(directory, dtype=dtype, device=device)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise TersorError("the prompt is empty; give at least one token to continue")
    check_tokens(module, ids, tokenizer)
    check_length(module, ids.shape[1], max_new_tokens)
    sampling = sampling_of(module, given, seed=seed)
    if not_done := settings_not_done(module):
        notice(f"generation_config.json asks for {', '.join(not_done)}, which tersor does not do")
    engine = make_engine(module, capacity=ids.shape[1] + max_new_tokens, take_over=True)
    yield from stream_tokens(
        engine, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, end=end_tokens(module, tokenizer)
    )


def sampling_of(module: nn.Module, given: Mapping[str, Any], *, seed: int = 0) -> Sampling:
    """What was given, else what the model's generation_config.json says; temperature 0 where neither asks for draws."""
    said = getattr(module, "generation_config", None)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := getattr(said, name, None)) is not None}
    if getattr(said, "do_sample", None):
        found = {"temperature": 1.0, "top_k": _TOP_K, **found}
    else:
        found.pop("temperature", None)
    try:
        return Sampling(**{**found, **given}, seed=seed)
    except (TypeError, TersorError) as error:
        raise TersorError(f"generation_config.json: {error}; give another value in its place") from None


def settings_not_done(module: nn.Module) -> list[str]:
    """What the model's generation_config.json asks for and tersor does not do."""
    said = getattr(module, "generation_config", None)
    asked = {name: getattr(said, name, None) for name in _NOT_DONE}
    return [name for name, value in asked.items() if value is not None and value not in _NOT_DONE[name]]


def end_tokens(module: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation config, else the tokenizer's."""
    found = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def tokens(
    engine: Engine, ids: Tensor, *, max_new_tokens: int, sampling: Sampling, end: frozenset[int] = frozenset()
) -> Iterator[int]:
    """The tokens that follow ids [1, tokens], one by one, without the one that ends the text."""
    generator = torch.Generator(engine.device).manual_seed(sampling.seed)
    seen = ids
    for _ in range(max_new_tokens):
        logits = engine.forward(ids)
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, seen.to(logits.device), sampling.repetition_penalty)
        ids = choose(logits, sampling, generator)
        seen = torch.cat([seen, ids.to(seen.device)], dim=1)
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
    text = TextStream(tokenizer, ids[0].tolist())
    for token in tokens(engine, ids, max_new_tokens=max_new_tokens, sampling=sampling, end=end):
        if piece := text.push(token):
            yield piece
    if piece := text.finish():
        yield piece
