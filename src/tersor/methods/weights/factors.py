"""Keeps the factor of the last Hessian, because maps that share a Hessian ask for it one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.methods.weights.gptq_solver import Factor, factorize


class Factors:
    def __init__(self, device: torch.device, *, damp: float, desc_act: bool = False) -> None:
        self.device, self.damp, self.desc_act = device, damp, desc_act
        self.last: tuple[Tensor, Factor, bool] | None = None

    def of(self, hessian: Tensor) -> tuple[Factor, bool]:
        """The factor, and whether the Hessian says anything. It is zero for a map that no token reached, which is then just
        rounded."""
        if self.last is None or self.last[0] is not hessian:
            self.last = None  # let go before the next is made: it may be large
            informed = bool(hessian.any())
            H = (
                hessian.to(self.device)
                if informed
                else torch.eye(len(hessian), dtype=hessian.dtype, device=self.device)
            )
            self.last = hessian, factorize(H, damp=self.damp, desc_act=self.desc_act), informed
        return self.last[1:]
