"""Generate text with a causal language model, piece by piece as it comes.

`open_writer` loads a model and all that belongs to writing with it, and `make_engine` picks how the model runs (`engine.py`).
`stream` is both and the loop over them.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import check_tokens, load, load_tokenizer, named_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.published import checkpoint_as, named_by
from tersor.checkpoint.source import Openable, open_checkpoint, torch_dtype
from tersor.devices import DType, pick_device
from tersor.errors import TersorError
from tersor.layers.quantized_linear import prepare_layers
from tersor.runtime import cached_module, chat_template, llama_cpu, llama_gpu, stepped_module
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.engine import Engine
from tersor.runtime.llama import FAMILY
from tersor.runtime.llama_cpu import LlamaCPU
from tersor.runtime.llama_gpu import LlamaGPU
from tersor.runtime.sampling import NOT_FINITE, Sampling, choose, finite, penalize
from tersor.runtime.stepped_module import RecomputedModule, SteppedModule
from tersor.runtime.text_stream import TextStream

_TOP_K = 50  # what a generation_config.json means that samples and does not say top_k
# Settings of a generation_config.json that tersor does not do, with the values by which they ask for nothing.
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
AHEAD = 1  # tokens that a GPU may be ahead of the host, so that it need not wait for the host between two


def make_engine(module: nn.Module, *, capacity: int, batch: int = 1, take_over: bool = False) -> Engine:
    """How a module in memory runs, with a cache for `batch` sequences of `capacity` tokens.

    take_over: the module is not needed for anything else, and its weights may be let go as they are repacked.
    Raises TersorError where it cannot continue a text.
    """
    if stepped_module.is_registered(module):
        return _engine_of_ours(module, capacity=capacity, batch=batch, take_over=take_over)
    if reason := cached_module.why_not(module):
        raise TersorError(reason)
    if llama_cpu.why_not(module) is None:
        return LlamaCPU(module, capacity=capacity, batch=batch, take_over=take_over)
    if llama_gpu.why_not(module) is None:
        return LlamaGPU(module, capacity=capacity, batch=batch, take_over=take_over)
    return CachedModule(module, capacity=capacity, batch=batch)


def _engine_of_ours(module: nn.Module, *, capacity: int, batch: int, take_over: bool) -> Engine:
    if reason := stepped_module.why_not(module):
        raise TersorError(reason)
    if reason := stepped_module.why_no_state(module):
        return RecomputedModule(module, reason, capacity=capacity, batch=batch)
    return SteppedModule(module, capacity=capacity, batch=batch, take_over=take_over)


def load_module(model: Openable, *, dtype: DType = "auto", device: str = "auto") -> nn.Module:
    """As `tersor.load`, but a bfloat16 model that LlamaCPU takes stays bfloat16 on a CPU: its values are read as they are."""
    checkpoint = open_checkpoint(model)
    if dtype == "auto" and pick_device(device).type == "cpu":
        config = checkpoint.config
        if (config.get("architectures") or [""])[0] in FAMILY and torch_dtype(config) == torch.bfloat16:
            module = load(checkpoint, dtype="bfloat16", device=device)
            if llama_cpu.why_not(module) is not None:
                prepare_layers(module.float())
            return module
    return load(checkpoint, dtype=dtype, device=device)


def check_length(module: nn.Module, prompt: int, new: int) -> None:
    """Raise TersorError where prompt and new tokens are more than the model has positions for."""
    most = positions_of(module)
    if most is not None and prompt + new > most:
        raise TersorError(f"a prompt of {prompt} tokens and {new} new ones are more than the model's {most} positions")


@dataclass(frozen=True)
class Writer:
    """A model that is ready to continue texts."""

    module: nn.Module
    tokenizer: Any  # the model's own, or the one that was named
    sampling: Sampling  # as asked for, else as the model says
    end: frozenset[int]  # the tokens that end a text
    notice: Callable[[str], None]  # called with a line for the user

    def engine(self, capacity: int) -> Engine:
        """How the model runs, for texts of up to `capacity` tokens. The module cannot be used for anything else afterwards."""
        engine = make_engine(self.module, capacity=capacity, take_over=True)
        if isinstance(engine, RecomputedModule):
            self.notice(f"{engine.reason}; every token is computed from the whole text")
        return engine

    def check(self, ids: Tensor) -> None:
        """Raise TersorError where a token is none of the model's. ids: [1, tokens]."""
        check_tokens(self.module, ids, self.tokenizer)
        most = stepped_module.vocabulary_of(self.module) if stepped_module.is_registered(self.module) else None
        if most is not None and ids.numel() and int(ids.max()) >= most:
            raise TersorError(
                f"the text has a token {int(ids.max())}, and the model knows {most}: the tokenizer is another model's"
            )


def open_writer(
    model: str | Path,
    *,
    sampling: Mapping[str, float | int | None] | None = None,
    seed: int = 0,
    variant: str | None = None,
    tokenizer: str | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    notice: Callable[[str], None] = warnings.warn,
) -> Writer:
    """Load a model and its tokenizer. sampling: fields of `Sampling`; what is None or absent is as the model's
    generation_config.json says, or off. variant: as `tersor.load` takes it. tokenizer: a directory or hub name, or "bytes", in
    place of the model's own.

    Raises TersorError where the model does not continue texts or has no tokenizer.
    """
    given = {name: value for name, value in (sampling or {}).items() if value is not None}
    Sampling(**given, seed=seed)  # type: ignore[arg-type]  # what is wrong in it shows before the model is loaded
    where = model if variant is None else checkpoint_as(model, variant)
    checkpoint = open_checkpoint(where)
    directory, system = checkpoint.directory, named_by(checkpoint.config)
    if system is not None and (other := stepped_module.why_not_named(system)):
        raise TersorError(other)
    found = load_tokenizer(directory) if tokenizer is None else named_tokenizer(tokenizer)
    if found is None:
        raise TersorError(f"{model} has no tokenizer, so it cannot read a prompt; name one with --tokenizer")
    module = load_module(checkpoint, dtype=dtype, device=device)
    reason = (stepped_module if stepped_module.is_registered(module) else cached_module).why_not(module)
    if reason is not None:
        raise TersorError(reason)
    chosen = sampling_of(module, given, seed=seed)
    if not_done := settings_not_done(module):
        notice(f"generation_config.json asks for {', '.join(not_done)}, which tersor does not do")
    return Writer(module, found, chosen, end_tokens(module, found), notice)


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
    chat: bool = False,
    system: str | None = None,
    variant: str | None = None,
    tokenizer: str | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    notice: Callable[[str], None] = warnings.warn,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they are made. temperature 0 takes the likeliest token every time.

    What is None is as the model's generation_config.json says, or off. Ends at the model's end-of-text tokens. chat: the prompt
    is the first message of a conversation, in the form of the model's chat template; system: a message before it, with `chat`.
    notice: called with a line for the user, such as that the model's file asks for more than tersor does. The others are as in
    `open_writer`. Raises TersorError where the model cannot generate, has no tokenizer, or the prompt leaves no room.
    """
    if max_new_tokens > NEW_TOKENS:
        raise TersorError(f"max_new_tokens {max_new_tokens} is more than the {NEW_TOKENS:,} that a text may have")
    if system is not None and not chat:
        raise TersorError("a system message needs the form of a conversation: chat=True")
    asked = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    writer = open_writer(
        model,
        sampling=asked,
        seed=seed,
        variant=variant,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        notice=notice,
    )
    stops: tuple[str, ...] = ()
    if chat:
        template = chat_template.of(writer.tokenizer)
        if template.plain:
            notice(chat_template.NONE)
        ids = template.ids(chat_template.opening(prompt, system))
        stops = template.stops
    else:
        ids = writer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise TersorError("the prompt is empty; give at least one token to continue")
    writer.check(ids)
    check_length(writer.module, ids.shape[1], max_new_tokens)
    engine = writer.engine(ids.shape[1] + max_new_tokens)
    pieces = stream_tokens(
        engine, writer.tokenizer, ids, max_new_tokens=max_new_tokens, sampling=writer.sampling, end=writer.end
    )
    yield from chat_template.until(pieces, stops)


def sampling_of(module: nn.Module, given: Mapping[str, Any], *, seed: int = 0) -> Sampling:
    """What was given, else what the model's generation_config.json says; temperature 0 where neither asks for sampling."""
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


class _Sent:
    """A token [1, 1] on its way from the device to the host."""

    def __init__(self, token: Tensor) -> None:
        self._token, self._event = token, None
        if token.is_cuda:
            self._token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(token.device))

    def arrived(self) -> int:
        """Waits for this token, but for nothing that the device was given to do since."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._token)


def tokens(
    engine: Engine,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end: frozenset[int] = frozenset(),
    ahead: int | None = None,
) -> Iterator[int]:
    """The tokens that follow ids [1, tokens], one by one, without the one that ends the text.

    ahead: at temperature 0, how many tokens the engine may be given to read before they are looked at here. They keep a
    GPU busy; the engine may have read that many after the end. None: AHEAD on a GPU, else 0.
    """
    if ahead is None:
        ahead = AHEAD if engine.device.type == "cuda" else 0
    if sampling.temperature > 0:
        ahead = 0  # a draw waits for its logits
    generator = torch.Generator(engine.device).manual_seed(sampling.seed)
    seen, sent = ids, deque[_Sent]()
    for _ in range(max_new_tokens):
        logits = engine.forward(ids)
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, seen.to(logits.device), sampling.repetition_penalty)
        if sampling.temperature > 0:
            told = ids = choose(logits, sampling, generator)
        else:
            ids = logits.argmax(dim=-1, keepdim=True)
            told = torch.where(finite(logits), ids, -1)
        if sampling.repetition_penalty != 1:
            seen = torch.cat([seen.to(ids.device), ids], dim=1)
        sent.append(_Sent(told))
        if len(sent) > ahead:
            token = _token(sent.popleft())
            if token in end:
                return
            yield token
    for each in sent:
        token = _token(each)
        if token in end:
            return
        yield token


def _token(sent: _Sent) -> int:
    token = sent.arrived()
    if token < 0:
        raise TersorError(NOT_FINITE)
    return token


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
