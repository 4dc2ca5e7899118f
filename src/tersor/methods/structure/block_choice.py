"""Which block of a stack matters least: FuseGPT's macro influence, ShortGPT's block influence, SLEB's perplexity.

    macro-influence   mean cosine similarity between the last block's output with and without a block (arXiv 2411.14507)
    block-influence   mean cosine similarity between a block's input and its output (ShortGPT, arXiv 2403.03853, whose block
                      influence is 1 minus this); all blocks to remove are chosen at once, as published
    perplexity        the model's loss on the samples' own tokens without a block (SLEB, arXiv 2402.09025)

As published, the first and the last are computed again after every removal. Similarities are of hidden states before the
model's last norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.calibrate.batches import Batch, call
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps
from tersor.methods.method import ModelMethod, Work, option
from tersor.methods.structure.block_stack import Calls, Stack

CHOICES = ("macro-influence", "block-influence", "perplexity")
CHOICE = f"{', '.join(CHOICES)}, or numbers of blocks such as 3,4 (the first is 0)"
SHARE = 0.25  # of the blocks to remove where no number is given, as published by FuseGPT


@dataclass(frozen=True)
class Choice:
    """A block to remove."""

    place: int  # its number now
    score: float | None  # the higher, the less it matters (a similarity, or minus the loss); None: the user named it


def is_choice(value: str | int) -> bool:
    """Whether it is a way to choose, or numbers of blocks with commas between."""
    return value in CHOICES or (
        all(n.isdecimal() for n in _words(value)) and len(set(_words(value))) == len(_words(value))
    )


def is_amount(value: float | None) -> bool:
    return value is None or 0 < value < 1 or (value >= 1 and value == int(value))


@dataclass(frozen=True)
class BlockRemoval(ModelMethod):
    """The options of a method that removes blocks."""

    blocks: float | None = option(
        None,
        "how many to remove; below 1 their share, rounded up (0.25, where none are named)",
        check=is_amount,
        allowed="a share between 0 and 1, or a whole number",
    )
    choose: str | int = option("macro-influence", f"by what: {CHOICE}", check=is_choice, allowed=CHOICE, word=True)


def how_many(blocks: float | None, choose: str | int, stack: Stack) -> int:
    """The number of blocks to remove. blocks: a number, or below 1 a share. Raises TersorError where no block would stay, or
    where `choose` names more or fewer blocks."""
    named = None if choose in CHOICES else len(_words(choose))
    asked = blocks if blocks is not None else named or SHARE
    count = math.ceil(asked * len(stack)) if asked < 1 else int(asked)
    if named not in (None, count):
        raise TersorError(f"choose={choose!r} names {named} blocks, and blocks={asked:g} asks for {count}")
    if count >= len(stack):
        raise TersorError(f"{count} blocks cannot be removed: the model has {len(stack)}, and one has to stay")
    return count


def choices(
    stack: Stack,
    choose: str | int,
    count: int,
    batches: Sequence[Batch],
    recorded: Sequence[Calls],
    kept: Sequence[nn.Module],
) -> Iterator[Choice]:
    """Yields the blocks to remove. The caller removes each before it asks for the next.

    choose: a name in CHOICES, or numbers of blocks in the original. batches: to score on; recorded: the same as they enter the
    stack.
    kept: blocks that stay. Raises TersorError where the numbers do not fit, or no block may go.
    """
    planned: list[tuple[nn.Module, float | None]] = []
    if choose not in CHOICES:
        named = [int(word) for word in _words(choose)]
        for number in named:
            if number >= len(stack):
                raise TersorError(f"choose={choose!r}: the model has blocks 0 to {len(stack) - 1}, not {number}")
            if stack.blocks[number] in kept:
                raise TersorError(f"choose={choose!r}: block {number} has layers that are to be left as they are")
        planned = [(stack.blocks[number], None) for number in named]
    elif choose == "block-influence":
        scores = block_influence(stack, recorded)
        order = scores.argsort(descending=True, stable=True).tolist()
        planned = [(stack.blocks[n], float(scores[n])) for n in order if stack.blocks[n] not in kept]
    for n in range(count):
        if choose in ("macro-influence", "perplexity"):
            scores = (
                macro_influence(stack, recorded) if choose == "macro-influence" else -losses_without(stack, batches)
            )
            order = [p for p in scores.argsort(descending=True, stable=True).tolist() if stack.blocks[p] not in kept]
            planned += [(stack.blocks[place], float(scores[place])) for place in order[:1]]
        if len(planned) <= n:
            raise TersorError("every block that is left has layers that are to be left as they are")
        block, score = planned[n]
        yield Choice(stack.blocks.index(block), score)


def kept_blocks(stack: Stack, work: Work) -> list[nn.Module]:
    """Blocks with a layer that the user excluded."""
    return [
        block
        for name, block in zip(stack.names, stack.blocks, strict=True)
        if not all(work.wanted(f"{name}.{each}") for each in linear_maps(block))
    ]


@torch.no_grad()
def macro_influence(stack: Stack, recorded: Sequence[Calls]) -> Tensor:
    """[blocks], float64: the mean cosine similarity of the last hidden states with and without each block."""
    found = torch.zeros(len(stack), dtype=torch.float64)
    for calls in recorded:
        inputs = list(_inputs(stack, calls))  # the input of every block, and the output of the last
        for n in range(len(stack)):
            without = stack.run(calls, range(n + 1, len(stack)), inputs[n])
            found[n] += _similarity(inputs[-1], without) / len(recorded)
    return found


@torch.no_grad()
def block_influence(stack: Stack, recorded: Sequence[Calls]) -> Tensor:
    """[blocks], float64: the mean cosine similarity of each block's input and output; ShortGPT's influence is 1 minus this."""
    found = torch.zeros(len(stack), dtype=torch.float64)
    for calls in recorded:
        inputs = list(_inputs(stack, calls))
        for n in range(len(stack)):
            found[n] += _similarity(inputs[n], inputs[n + 1]) / len(recorded)
    return found


@torch.no_grad()
def losses_without(stack: Stack, batches: Sequence[Batch]) -> Tensor:
    """[blocks], float64: the mean negative log-likelihood of the samples' next tokens without each block. Raises TersorError
    where the model does not predict tokens."""
    found = torch.zeros(len(stack), dtype=torch.float64)
    for n in range(len(stack)):
        tokens = 0
        with stack.without(n):
            for batch in batches:
                ids, logits = batch.get("input_ids"), getattr(call(stack.model, batch), "logits", None)
                if not isinstance(ids, Tensor) or not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
                    raise TersorError(f"perplexity needs a language model, not {type(stack.model).__name__}")
                found[n] += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                tokens += ids[:, 1:].numel()
        found[n] /= max(tokens, 1)
    return found


def _inputs(stack: Stack, calls: Calls) -> Iterator[Tensor]:
    hidden = calls.hidden
    yield hidden
    for n in range(len(stack)):
        hidden = stack.run(calls, [n], hidden)
        yield hidden


def _similarity(a: Tensor, b: Tensor) -> float:
    """The mean cosine similarity over the last axis."""
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def _words(choose: str | int) -> list[str]:
    return [word.strip() for word in str(choose).split(",")]
