"""BertAdam: Adam as BERT was published with it (Devlin et al., 2019), without the correction of the first steps' bias.

    m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g²,  w = w - lr (m / (√v + 1e-6) + decay w)

The first steps are up to √10 times larger than those of Adam. The rate rises linearly over the first tenth of the steps and
falls linearly to 0 after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

WARM_UP = 0.1  # of the steps


class BertAdam(torch.optim.Optimizer):
    """`taken` counts the steps that were done; `whole` is False in the middle of one, as where Ctrl-C interrupts it."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.taken, self.whole = 0, True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.whole = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["m"].lerp_(p.grad, 0.1), state["v"].lerp_(p.grad.square(), 0.001)
                p.sub_((m / (v.sqrt() + 1e-6) + group["weight_decay"] * p) * group["lr"])
        self.taken += 1
        self.whole = True


def bert_adam(model: nn.Module, lr: float, weight_decay: float = 0.01) -> BertAdam:
    """The optimizer, with decay for matrices but not for biases and norms."""
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() <= 1]
    return BertAdam([{"params": decayed, "weight_decay": weight_decay}, {"params": others}], lr=lr)


def warm_and_linear(step: int, steps: int) -> float:
    """The share of the rate at a step, from 0."""
    warm = WARM_UP * steps
    return (step + 1) / (warm + 1) if step < warm else (steps - step) / max(1.0, steps - warm)
