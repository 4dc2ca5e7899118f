"""DeepSets with a virtual node's reach, the global part "DSVN" of a GraphGPS layer (Cai et al., ICML 2023, 2301.11956).

A layer, with the nodes x_i of a graph and reduce their mean, sum, largest or smallest:

    y_i = norm(act(x_i A + (reduce_j x_j) B + b))           A, B [d, d], applied on the right

Published quirks: in training BatchNorm's statistics also count the padded rows of the dense batch, which hold act(0);
norms are there whatever the option `batchnorm` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.layers.checks import at_least, one_of

REDUCTIONS = ("mean", "sum", "max", "min")
NONLINEAR: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "identity": nn.Identity}


@dataclass(frozen=True, kw_only=True)
class DeepSetsConfig:
    reduction: str = "mean"
    nonlinear: str = "relu"
    n_layers: int = 1

    def __post_init__(self) -> None:
        one_of("DSVN", "reduction", self.reduction, REDUCTIONS)
        one_of("DSVN", "nonlinear", self.nonlinear, NONLINEAR)
        at_least("DSVN", 1, n_layers=self.n_layers)


class EquivLinear(nn.Module):
    """x [G, n, d], real [G, n] -> [G, n, d], zero where no node is."""

    def __init__(self, d: int, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.alpha, self.beta = (nn.Parameter(nn.init.xavier_normal_(torch.empty(d, d))) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(1, d))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        shared = self._reduce(x, real[..., None]) @ self.beta  # [G, 1, d]
        return (x @ self.alpha + shared + self.bias).masked_fill(~real[..., None], 0)

    def _reduce(self, x: Tensor, real: Tensor) -> Tensor:
        if self.reduction == "max":
            return x.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
        if self.reduction == "min":
            return x.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        total = x.masked_fill(~real, 0).sum(1, keepdim=True)
        return total if self.reduction == "sum" else total / real.sum(1, keepdim=True)


class DeepSets(nn.Module):
    """In the place of attention within each graph: (x [G, n, d] padded, real [G, n], not used) -> [G, n, d]."""

    def __init__(self, d: int, config: DeepSetsConfig) -> None:
        super().__init__()
        self.ds = nn.Module()
        self.names = [f"EquivLinear-{k}" for k in range(config.n_layers)]
        for name in self.names:
            self.ds.add_module(name, EquivLinear(d, config.reduction))
        self.bn_layers = nn.ModuleList(nn.BatchNorm1d(d) for _ in range(config.n_layers))
        self.nonlinear = NONLINEAR[config.nonlinear]()

    def forward(self, x: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
        for name, norm in zip(self.names, self.bn_layers, strict=True):
            x = norm(self.nonlinear(self.ds.get_submodule(name)(x, real)).mT).mT
        return x
