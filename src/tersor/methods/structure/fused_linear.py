"""A linear map that takes up others' weights by learned coefficients (FuseGPT, arXiv 2411.14507); for training only.

    y = x Wᵀ_eff + b_eff        W_eff = W + B A + Σ_j C_j * F_j  (entry by entry)        b_eff = b + c * b_fused

W [out, in] and the fused F_j [out, in] stay as they are. A [128, in] and B [out, 128] change W. C_j weighs the entries of F_j:

    lora      C_j = P_j R_j, P_j [out, r], R_j [r, in]      keys coef_list.j.0, coef_list.j.1
    matrix    C_j [out, in]                                 key coef_list.j
    vector    C_j [out, 1], for all entries of a row        key coef_list.j

All start so that W_eff = W. When another bias is fused, the one before becomes part of b, so that fusing never changes the
output; the published code forgets it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.linear_map import set_weight_matrix, weight_matrix

MODES = ("lora", "matrix", "vector")
BASE_RANK = 128  # of B A, as published


class FusedLinear(nn.Module):
    """In place of nn.Linear or transformers' Conv1D, x [..., in] -> [..., out], until it is folded.

    mode: one of MODES. rank: r. chance: the generator that A and R_j are drawn from.
    """

    def __init__(self, linear: nn.Module, *, mode: str, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        W, bias = weight_matrix(linear).detach(), getattr(linear, "bias", None)
        self.mode, self.rank, self.chance = mode, rank, chance
        self.replaced = (linear,)  # in a tuple, so that it is no part of this module
        self.weight = nn.Parameter(W.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.lora_A = self._drawn(BASE_RANK)
        self.lora_B = self._zeros(BASE_RANK)
        self.coef_list: nn.Module = nn.ModuleList() if mode == "lora" else nn.ParameterList()
        self.fused: list[Tensor] = []
        self.fused_bias: Tensor | None = None
        self.fuse_coef_b: nn.Parameter | None = None

    def fuse(self, weight: Tensor, bias: Tensor | None) -> None:
        """Add another map's weight [out, in] and bias [out] to learn from. The output stays the same."""
        self.fused.append(weight.detach())
        if self.mode == "lora":
            self.coef_list.append(nn.ParameterList([self._zeros(self.rank), self._drawn(self.rank)]))  # type: ignore[operator]
        else:
            columns = 1 if self.mode == "vector" else self.weight.shape[1]
            self.coef_list.append(self._zeros(columns))  # type: ignore[operator]
        if self.bias is not None and bias is not None:
            self.bias.data = self.effective_bias().detach()  # type: ignore[union-attr]
            self.fused_bias, self.fuse_coef_b = bias.detach(), nn.Parameter(torch.zeros_like(self.bias))

    def effective_weight(self) -> Tensor:
        """W_eff [out, in]."""
        weight = self.weight + self.lora_B @ self.lora_A
        for coefficient, fused in zip(self.coef_list, self.fused, strict=True):  # type: ignore[call-overload]
            if self.mode == "lora":
                left, right = coefficient
                weight = weight + (left @ right) * fused
            else:
                weight = weight + coefficient * fused
        return weight

    def effective_bias(self) -> Tensor | None:
        """b_eff [out]."""
        if self.bias is None or self.fused_bias is None or self.fuse_coef_b is None:
            return self.bias
        return self.bias + self.fuse_coef_b * self.fused_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.effective_bias())

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The plain map that this one replaced, with the learned weight."""
        linear = self.replaced[0]
        set_weight_matrix(linear, self.effective_weight())
        bias = self.effective_bias()
        if bias is not None:
            linear.bias.copy_(bias)  # type: ignore[operator]
        return linear

    def _zeros(self, columns: int) -> nn.Parameter:
        return nn.Parameter(self.weight.new_zeros(self.weight.shape[0], columns))

    def _drawn(self, rows: int) -> nn.Parameter:
        """Uniform numbers within ±1/√in, as Kaiming initialisation with a = √5."""
        columns = self.weight.shape[1]
        values = torch.rand(rows, columns, generator=self.chance, dtype=torch.float64).mul(2).sub(1) / columns**0.5
        return nn.Parameter(values.to(self.weight))
