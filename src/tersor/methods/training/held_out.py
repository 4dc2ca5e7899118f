"""What methods that tune packed layers share: samples kept apart, the steps that learn from the others, the losses on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor, predicts, without_target
from tersor.errors import TersorError
from tersor.methods.training.batches import joined, order_of, shapes_of
from tersor.methods.training.tuned_weight import requiring

SHARE = 8  # one sample of so many is kept apart
NUMBERS = 1 << 24  # logits in float32 at once


def split(samples: Sequence[dict[str, Any]], method: str) -> tuple[list[Batch], list[Batch]]:
    """Samples to learn from, and every eighth, at least one, to judge by. Raises TersorError where there are too few."""
    given = [without_target(dict(each)) for each in samples]
    if len(given) < 2:
        raise TersorError(f"{method} keeps samples apart to judge by: give at least 2, not {len(given)}")
    apart = [n for n in range(len(given)) if n % SHARE == SHARE - 1] or [len(given) - 1]
    return [each for n, each in enumerate(given) if n not in apart], [given[n] for n in apart]


def drawn(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """The samples of every step: each epoch has an order of its own, and its last step may have fewer."""
    orders = [order_of(epoch, count, seed) for epoch in range(epochs)]
    return [order[first : first + size] for order in orders for first in range(0, count, size)]


def rate(step: int, steps: int, warm_up: float = 0.05) -> float:
    """The learning rate of a step, from 0 to 1: a linear rise, then half a cosine."""
    rise = max(1.0, warm_up * steps)
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def travelled(steps: int) -> float:
    """The sum of the rates of all steps: how far Adam at rate 1 goes where a gradient keeps its sign."""
    return sum(rate(step, steps) for step in range(steps))


def learn(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    steps: Sequence[list[int]],
    *,
    epochs: int,
    offsets: Sequence[Tensor],
    backward: Callable[[int, list[int]], None],
    judge: Callable[[], float],
    start: float,
) -> float:
    """Tensors learn by Adam; they end in the best state of all epochs, or as they were where none was better. Returns its loss.

    groups: the tensors, each group with its rate. steps: the samples of each step, from `drawn`. offsets: tensors among them
    that are kept within [-1, 1]. backward: makes the gradients, given the step's number and its samples. judge: returns the
    loss on the samples kept apart. start: that loss before the first step.
    """
    groups = [(tensors, lr) for tensors, lr in groups if tensors]
    learning = [each for tensors, _ in groups for each in tensors]
    optimizer = torch.optim.Adam([{"params": tensors} for tensors, _ in groups], betas=(0.9, 0.95))
    best, kept = start, [each.clone() for each in learning]
    for step, chosen in enumerate(steps):
        with requiring(learning), torch.enable_grad():
            backward(step, chosen)
        for group, (_, lr) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = lr * rate(step, len(steps))
        optimizer.step()
        optimizer.zero_grad()
        for each in offsets:
            each.clamp_(-1, 1)
        if (step + 1) % (len(steps) // epochs) == 0 and (now := judge()) < best:
            best, kept = now, [each.clone() for each in learning]
    for each, state in zip(learning, kept, strict=True):
        each.copy_(state)
    return best


def as_batches(samples: Sequence[Batch]) -> list[tuple[Batch, float]]:
    """The samples as batches: one where they can run together, else one each. Each comes with its weight in the mean."""
    if len({shapes_of(each) for each in samples}) == 1:
        return [(joined(samples), 1.0)]
    return [(each, 1 / len(samples)) for each in samples]


def divergence(model: nn.Module, original: nn.Module, samples: Sequence[Batch]) -> Tensor:
    """The mean over samples, in float32: KL(original || model) of predictions where the model makes any, else the squared
    error of its first output relative to the output. Padding does not count."""
    return torch.stack([_loss(model, original, batch) * weight for batch, weight in as_batches(samples)]).sum()


def _loss(model: nn.Module, original: nn.Module, batch: Batch) -> Tensor:
    made = call(model, batch)
    with torch.no_grad():
        wanted = first_tensor(call(original, batch))
    output = first_tensor(made)
    if output is None or wanted is None:
        raise TersorError(f"{type(model).__name__} gives no tensor to tune on")
    shown = batch.get("attention_mask")
    if not isinstance(shown, Tensor) or output.dim() != 3 or shown.shape != output.shape[:2]:
        shown = torch.ones(output.shape[:-1], device=output.device)
    share = shown / shown.sum()
    if predicts(model, made):
        found: Tensor = Divergence.apply(output.flatten(0, -2), wanted.flatten(0, -2), share.flatten().float())  # type: ignore[no-untyped-call]
        return found
    output, wanted = output.float(), wanted.float()
    losses = (output - wanted).square().sum(-1) / wanted.square().sum(-1).mean().clamp(min=1e-30)
    return (losses * share).sum()


class Divergence(torch.autograd.Function):
    """Σ_n w_n KL(p_n || q_n) of rows of logits, in float32 a few rows at a time: all at once would take several times the memory
    of the logits."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
        """output: logits of q [rows, vocabulary]. wanted: those of p. share: w [rows]."""
        rows = max(1, NUMBERS // output.shape[-1])
        learns = ctx.needs_input_grad[0]
        total, gradient = share.new_zeros(()), torch.empty_like(output) if learns else None
        for first in range(0, len(output), rows):
            part = slice(first, first + rows)
            p, q = wanted[part].float().log_softmax(-1), output[part].float().log_softmax(-1)
            P = p.exp()
            total += (P * (p - q)).sum(-1) @ share[part]
            if gradient is not None:
                gradient[part] = (q.exp() - P) * share[part, None]
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * scale[0], None, None


@torch.no_grad()
def judged(model: nn.Module, original: nn.Module, apart: Sequence[Batch]) -> float:
    return sum(float(divergence(model, original, [each])) for each in apart) / len(apart)
