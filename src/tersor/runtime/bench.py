"""How fast a model runs: prompt and new tokens per second, time to the first token, memory. Models are compared turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.runtime.engine import Engine
from tersor.runtime.stepped_module import vocabulary_of

TOKENS = 1 << 24


@dataclass(frozen=True)
class Turn:
    """Seconds from the prompt to the logits of the first new token, and from there to all the others."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Spread:
    """Median of the turns, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def check_sizes(*, prompt_tokens: int, new_tokens: int, batch: int, repeats: int) -> None:
    """Raise TersorError where nothing could be measured."""
    sizes = {"prompt tokens": prompt_tokens, "sequences in a batch": batch, "repeats": repeats}
    for what, number in sizes.items():
        if number < 1:
            raise TersorError(f"{number} {what}: at least 1 is needed")
    if (prompt_tokens + new_tokens) * batch > TOKENS or repeats > TOKENS:
        raise TersorError(
            f"{batch} x {prompt_tokens + new_tokens} tokens, {repeats} times: at most {TOKENS:,} are measured"
        )
    if new_tokens < 2:
        raise TersorError(f"{new_tokens} new tokens: at least 2 are needed, as the first comes with the prompt")


def take_turn(engine: Engine, ids: torch.Tensor, new_tokens: int) -> Turn:
    """One prompt, ids [batch, tokens], and the likeliest tokens that follow it, new_tokens in all."""
    engine.reset()
    start = time.perf_counter()
    token = engine.forward(ids).argmax(dim=-1, keepdim=True).cpu()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = engine.forward(token).argmax(dim=-1, keepdim=True).cpu()
    return Turn(first - start, time.perf_counter() - first)


def measure(
    runners: dict[str, Callable[[], Turn]], *, repeats: int, warm_up: int = 1, progress: Progress | None = None
) -> dict[str, list[Turn]]:
    """All runners one after another, `repeats` times, after `warm_up` rounds that do not count."""
    turns: dict[str, list[Turn]] = {name: [] for name in runners}
    for index in range(warm_up + repeats):
        for name, run in runners.items():
            if progress is not None:
                progress(name, index, warm_up + repeats)
            turn = run()
            if index >= warm_up:
                turns[name].append(turn)
    return turns


def speeds(turns: Sequence[Turn], *, prompt_tokens: int, new_tokens: int, batch: int) -> dict[str, Spread]:
    """Tokens per second of all sequences together, and seconds to the first token."""
    return {
        "prefill": spread([batch * prompt_tokens / turn.prefill for turn in turns]),
        "decode": spread([batch * (new_tokens - 1) / turn.decode for turn in turns]),
        "first_token": spread([turn.prefill for turn in turns]),
    }


def ratios(turns: Sequence[Turn], others: Sequence[Turn]) -> dict[str, Spread]:
    """How many times faster than the other, turn by turn."""
    pairs = list(zip(turns, others, strict=True))
    return {
        "prefill": spread([other.prefill / turn.prefill for turn, other in pairs]),
        "decode": spread([other.decode / turn.decode for turn, other in pairs]),
    }


def prompt_for(module: nn.Module, *, batch: int, tokens: int) -> torch.Tensor:
    """A random prompt for a model that has an engine."""
    vocabulary = vocabulary_of(module)
    assert vocabulary is not None  # make_engine refuses a model without tokens
    return random_prompt(vocabulary, batch=batch, tokens=tokens)


def random_prompt(vocabulary: int, *, batch: int, tokens: int) -> torch.Tensor:
    """Token ids [batch, tokens], the same at every call. The time does not depend on them."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
