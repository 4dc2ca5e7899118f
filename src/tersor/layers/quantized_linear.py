"""A linear layer whose weight is packed integers, whichever format it was read from or will be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels.quantized_matmul import PreparedWeight, prepare, quantized_matmul, restore


class QuantizedLinear(nn.Module):
    """Drop-in for nn.Linear (and transformers' Conv1D): x [..., in] -> [..., out] in x's dtype."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.in_features = weight.bits, weight.group_size, weight.in_features
        self.out_features = weight.out_features
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("g_idx", weight.g_idx)
        self.register_buffer("bias", bias)
        self.prepared: PreparedWeight | None = None

    def prepare(self) -> None:
        """Repack for the device's kernel and let the standard layout go; to be called where the layer will run."""
        self.prepared = prepare(self.packed)
        self.qweight = self.scales = self.zeros = self.g_idx = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Back to the standard layout. Moving or casting the module does this by itself."""
        if self.prepared is not None:
            weight, self.prepared = self.packed, None
            self.qweight, self.scales, self.zeros = weight.qweight, weight.scales, weight.zeros
            self.g_idx = weight.g_idx

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared is not None:
            weight = self.packed
            tensors = {"qweight": weight.qweight, "scales": weight.scales, "zeros": weight.zeros, "g_idx": weight.g_idx}
            destination.update({prefix + name: tensor for name, tensor in tensors.items() if tensor is not None})

    @property
    def packed(self) -> QuantizedWeight:
        """The weight in its standard layout, whichever layout is held."""
        if self.prepared is not None:
            return restore(self.prepared)
        return QuantizedWeight(
            self.qweight, self.scales, self.zeros, self.g_idx, self.bits, self.group_size, self.in_features
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in]; a new tensor at every access, for code that only looks at it."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        y = quantized_matmul(x, self.packed if self.prepared is None else self.prepared)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


def scale_dtype_of(module: nn.Module) -> torch.dtype:
    """Scales follow the layer's own precision where it is wider than half, else float16."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return dtype if dtype == torch.float64 else torch.float16
