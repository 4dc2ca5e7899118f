"""One linear map's weight as integers on grids. Every reader of packed weights returns it, and every kernel takes it.

    W[o, i] = scales[g_idx[i], o] * (codes[o, i] - zeros[g_idx[i], o])

with `g_idx[i] = i // group_size` where `g_idx` is None. The integers are kept packed (GPTQ's v2 layout: along the input).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.formats.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class QuantizedWeight:
    """Packed integer weight [out, in].

    qweight: int32 [packed_size(in, bits), out], the codes 0 .. 2^bits - 1 packed along the input.
    scales:  floating [groups, out], step sizes.
    zeros:   uint8 [groups, out], zero points (the code that means 0.0), unpacked and without any offset.
    g_idx:   int32 [in], the group of every input column, or None where it is i // group_size.
    group_size: input columns a group; -1 stands for one group of all columns.
    a_bits: to which inputs are rounded before the product, each token on a grid of its own (`token_codes`); None: they are not.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    bits: int
    group_size: int
    in_features: int
    a_bits: int | None = None

    def __post_init__(self) -> None:
        rows = packed_size(self.in_features, self.bits)
        if self.qweight.shape[0] != rows:
            raise ValueError(
                f"qweight has {self.qweight.shape[0]} rows; {self.in_features} inputs at {self.bits} bits need {rows}"
            )
        if self.scales.shape != self.zeros.shape or self.scales.shape[1] != self.out_features:
            raise ValueError(
                f"scales {tuple(self.scales.shape)} and zeros {tuple(self.zeros.shape)} must both be "
                f"[groups, {self.out_features}]"
            )

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int, g_idx: Tensor | None = None
    ) -> QuantizedWeight:
        """From integers [out, in]; `scales`, `zeros` [groups, out]. A g_idx that is simply i // group_size is dropped."""
        in_features = codes.shape[1]
        if g_idx is not None and torch.equal(g_idx.cpu().long(), natural_groups(in_features, group_size)):
            g_idx = None
        return cls(
            qweight=pack(codes.t(), bits, dim=0),
            scales=scales.contiguous(),
            zeros=zeros.to(torch.uint8).contiguous(),
            g_idx=None if g_idx is None else g_idx.to(torch.int32),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
        )

    def codes(self) -> Tensor:
        """The integers, uint8 [out, in]."""
        return unpack(self.qweight, self.bits, self.in_features, dim=0).t()

    def groups(self) -> Tensor:
        """The group of every input column, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return natural_groups(self.in_features, self.group_size, self.qweight.device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (that of the scales where not given), computed in at least float32."""
        compute = torch.promote_types(self.scales.dtype, torch.float32)
        index = self.groups()
        scales, zeros = self.scales.to(compute)[index], self.zeros.to(compute)[index]  # [in, out]
        weight = (self.codes().t().to(compute) - zeros) * scales
        return weight.t().to(dtype or self.scales.dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Outputs start .. stop - 1 as a weight of their own."""
        return replace(
            self,
            qweight=self.qweight[:, start:stop].contiguous(),
            scales=self.scales[:, start:stop].contiguous(),
            zeros=self.zeros[:, start:stop].contiguous(),
        )

    def take_rows(self, index: Tensor) -> QuantizedWeight:
        """The outputs of these numbers, int64 [n], as a weight of their own."""
        return replace(
            self,
            qweight=self.qweight.t().index_select(0, index).t(),
            scales=self.scales.t().index_select(0, index).t(),
            zeros=self.zeros.t().index_select(0, index).t(),
        )

    @classmethod
    def stack_rows(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The outputs of several weights on the same inputs and groups, one after another. Inverse of `rows`."""
        first = parts[0]
        if any(p.bits != first.bits or p.scales.shape[0] != first.scales.shape[0] for p in parts):
            raise ValueError("weights of different bits or groups cannot be stacked")
        return replace(
            first,
            qweight=torch.cat([p.qweight for p in parts], 1),
            scales=torch.cat([p.scales for p in parts], 1),
            zeros=torch.cat([p.zeros for p in parts], 1),
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return replace(
            self,
            qweight=self.qweight.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
        )


def natural_groups(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """i // group_size for every input column i, int64 [in]; all zeros where group_size is -1."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, device=device) // size
