"""The quantized matmul by torch's own int4 operator, for symmetric weights on a CPU without a C++ compiler.

It is used for bfloat16 activations only: the operator's float32 path takes 30 times as long. Scales are rounded to bfloat16; the
reference rounds every weight to it. 2 and 3 bits are widened to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight

GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Int4Weight:
    """The weight in the operator's layout, and `standard`, the weight as it was, for what the operator cannot do.

    packed: uint8 [out, in / 2] in the operator's order, codes counted from 8.
    scales_and_zeros: bfloat16 [groups, out, 2]; the zeros, added after scaling, are 0.
    """

    standard: QuantizedWeight
    packed: Tensor
    scales_and_zeros: Tensor

    @property
    def in_features(self) -> int:
        return self.standard.in_features


def why_not(weight: QuantizedWeight) -> str | None:
    """Why `prepare` cannot take this weight, or None."""
    if weight.a_bits is not None:
        return "inputs that are rounded"
    if weight.bits not in (2, 3, 4):
        return f"{weight.bits} bits"
    if weight.g_idx is not None:
        return "a g_idx"
    if weight.group_size not in GROUP_SIZES or weight.in_features % weight.group_size:
        return f"{weight.in_features} inputs in groups of {weight.group_size}"
    if weight.out_features % 16:
        return f"{weight.out_features} outputs, not a multiple of 16"
    if bool((weight.zeros != 2 ** (weight.bits - 1)).any()):
        return "zero points other than the middle"
    return None


def prepare(weight: QuantizedWeight) -> Int4Weight:
    """Pack for the operator. Raises ValueError where `why_not` has a reason."""
    if reason := why_not(weight):
        raise ValueError(f"torch's int4 operator does not take {reason}; use the reference")
    codes = weight.codes().to(torch.int32) + (8 - 2 ** (weight.bits - 1))
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    scales = weight.scales.to(torch.bfloat16)
    return Int4Weight(weight, packed, torch.stack([scales, torch.zeros_like(scales)], dim=-1))


def matmul(x: Tensor, weight: Int4Weight) -> Tensor:
    """y = x · Wᵀ for bfloat16 x [..., in] that needs no gradient."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch._weight_int4pack_mm_for_cpu(rows, weight.packed, weight.standard.group_size, weight.scales_and_zeros)
    return y.view(*x.shape[:-1], -1)
