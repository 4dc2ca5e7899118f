"""Which weights and heads stay alive: GTSP's schedules (Liu et al., "Exploring Sparsity in Graph Transformers", 2023; weights:
GraNet, arXiv 2106.10404).

Weights, at every update:  a) all over the model the smallest |w| go until the density that a cubic curve prescribes;
b) in each tensor a share of those alive with the least |w| goes; c) as many come back where the gradient is largest, at 0.

    granet   a, b, c      gmp   a alone      dst   b, c      uniform   a in each tensor by itself

Heads, at every update: the least important of those alive die, and as many of all the dead come back with the largest gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WAYS = ("granet", "gmp", "dst", "uniform")
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Curve:
    """density(step) falls from `first` to `last` as 1 - (1 - u)³, from step `start` to step `end`. There is an update every
    `frequency` steps."""

    first: float
    last: float
    start: int
    end: int
    frequency: int

    def updates(self) -> range:
        """The updates at which the density falls, numbered step / frequency."""
        return range(self.start // self.frequency, self.end // self.frequency)

    def density(self, step: int) -> float | None:
        """The density at an update; None outside."""
        inside, update = self.updates(), step // self.frequency
        if step % self.frequency or update not in inside:
            return None
        u = (update - inside.start) / len(inside)
        # Exactly as published, because rounding decides how many weights stay.
        return 1 - ((1 - self.first) + (self.first - self.last) * (1 - (1 - u) ** 3))


def prune_globally(weights: Mapping[str, Tensor], density: float) -> Masks:
    """a) Masks of the |w| above the ⌊n · density⌋-th largest of all n. Strictly above, as published, so one fewer survives."""
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    kept = int(len(sizes) * density)
    if kept == 0:
        return {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
    threshold = sizes.topk(kept).values[-1]
    return {name: w.detach().abs() > threshold for name, w in weights.items()}


def prune_uniformly(weights: Mapping[str, Tensor], density: float) -> Masks:
    """The same for each tensor by itself; here the threshold itself survives."""
    masks = {}
    for name, w in weights.items():
        sizes, kept = w.detach().abs(), int(w.numel() * density)
        masks[name] = sizes >= sizes.flatten().topk(kept).values[-1] if kept else torch.zeros_like(w, dtype=torch.bool)
    return masks


def die_and_grow(weight: Tensor, gradient: Tensor, mask: Tensor, rate: float) -> Tensor:
    """b) and c) for one tensor: ⌈rate · alive⌉ die, as many come back where |gradient| is largest among all the dead."""
    alive = int(mask.sum())
    sizes = torch.where(mask, weight.detach().abs(), 0.0)
    dying = math.ceil(rate * alive)
    if dying == 0:
        return mask
    threshold = sizes.flatten().kthvalue(mask.numel() - alive + dying).values
    left = sizes > threshold
    wanted = torch.where(left, -1.0, gradient.abs()).flatten()
    grown = left.clone().flatten()
    grown[wanted.topk(alive - int(left.sum())).indices] = True
    return grown.view_as(mask)


def update_weights(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    masks: Masks,
    *,
    way: str,
    density: float | None,
    rate: float,
) -> tuple[Masks, Masks]:
    """One update: the masks after a), and after c). Masked `weights` are set to 0 after each. density: None where a) is not
    due."""
    if density is not None and way != "dst":
        masks = (prune_uniformly if way == "uniform" else prune_globally)(weights, density)
        apply_masks(weights, masks)
    grown = masks
    if way in ("granet", "dst"):
        grown = {name: die_and_grow(w, gradients[name], masks[name], rate) for name, w in weights.items()}
        apply_masks(weights, {name: grown[name] & masks[name] for name in grown})  # weights that come back start at 0
    return masks, grown


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Masks) -> None:
    for name, weight in weights.items():
        weight.mul_(masks[name])


def head_scores(output: Tensor, gradient: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Importance and growth scores of the heads, [heads] each: mean over graphs of |Σ A · dL/dA| and of Σ |dL/dA| over nodes and
    channels. output A: of attention after its last projection, [G, n, c], whose channels are cut into heads, as published,
    although each of them mixes all heads."""
    A, dA = (each.reshape(*each.shape[:-1], heads, -1) for each in (output.detach(), gradient))
    importance = (A * dA).sum((1, 3)).abs().mean(0)
    return importance, dA.abs().sum((1, 3)).mean(0)


def update_heads(alive: Tensor, importance: Tensor, growth: Tensor, rate: float) -> Tensor:
    """alive [heads] after ⌈rate · alive⌉ of least importance died and as many of the dead with most growth came back."""
    dying = math.ceil(rate * int(alive.sum()))
    left = alive.clone()
    left[torch.where(alive, importance, torch.inf).topk(dying, largest=False).indices] = False
    left[torch.where(left, -torch.inf, growth).topk(dying).indices] = True
    return left
