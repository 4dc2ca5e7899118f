"""LED, the linear encoder-decoder: a linear map of low rank as two, y = D (E x) + b with E [r, in] and D [out, r].

Greenformers (Cahyawijaya, arXiv 2108.10808), whose tensor names these are: `led_unit.0.weight` is E, `led_unit.1.weight`
D, `led_unit.1.bias` b. It has r (in + out) weights instead of in · out, and as many products per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape


@exchangeable
class LED(nn.Module):
    """Drop-in for nn.Linear and transformers' Conv1D: x [..., in] -> [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.led_unit = nn.Sequential(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def in_place_of(cls, original: nn.Module, rank: int) -> LED:
        out_features, in_features = matrix_shape(original)
        weight = original.weight
        assert isinstance(weight, Tensor)
        bias = getattr(original, "bias", None) is not None
        return cls(in_features, out_features, rank, bias=bias, device=weight.device, dtype=weight.dtype)

    @property
    def weight(self) -> Tensor:
        """D E [out, in], a new tensor at every access, for code that looks at a layer's weight instead of calling it."""
        encoder, decoder = self.led_unit
        return decoder.weight @ encoder.weight  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        return self.led_unit[1].bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.led_unit(x)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"
