"""y = x · dequant(W)ᵀ for a packed integer weight: the op, its reference, and the choice of a faster implementation.

x [..., in] floating, y [..., out] in x's dtype; the weight as in `formats.quantized_weight`. All other implementations are tested
against `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.formats.activation_grid import round_tokens
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import int8_matmul as int8
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.kernels import quantized_matmul_int4 as int4
from tersor.kernels import tiled_weight as gpu
from tersor.kernels.quantized_matmul_cuda import has_kernel, prepared_matmul


def reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Dequantize the whole weight to x's dtype, then one dense matmul; x is rounded before where the weight says so."""
    if weight.a_bits is not None:
        x = round_tokens(x)
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype))


@torch.library.custom_op("tersor::quantized_matmul", mutates_args=())
def _quantized_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    return reference(x, QuantizedWeight(qweight, scales, zeros, g_idx, bits, group_size, x.shape[-1]))


@_quantized_matmul.register_fake
def _(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, bits: int, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, qweight, scales, zeros, g_idx, bits, group_size = inputs
    ctx.save_for_backward(qweight, scales, zeros, g_idx)
    ctx.rest = (bits, group_size, x.shape[-1])


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The input's gradient only: the integers are frozen."""
    weight = QuantizedWeight(*ctx.saved_tensors, *ctx.rest)
    return grad @ weight.dequantize(grad.dtype), None, None, None, None, None, None


_quantized_matmul.register_autograd(_backward, setup_context=_setup_context)


def _matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    y: Tensor = _quantized_matmul(
        x if weight.a_bits is None else round_tokens(x),
        weight.qweight,
        weight.scales,
        weight.zeros,
        weight.g_idx,
        weight.bits,
        weight.group_size,
    )
    return y


def _int4_matmul(x: Tensor, weight: int4.Int4Weight) -> Tensor:
    """torch's operator where it is faster and no gradient is wanted, else the reference."""
    if x.dtype == torch.bfloat16 and not (x.requires_grad and torch.is_grad_enabled()):
        return int4.matmul(x, weight)
    return _matmul(x, weight.standard)


@dataclass(frozen=True)
class Kernel:
    """How one kind of prepared weight is made and used. `matmul` is differentiable in x and traceable by torch.compile."""

    takes: Callable[[QuantizedWeight], bool]  # whether `prepare` repacks this weight, on the device where it is
    prepare: Callable[[QuantizedWeight], Any]
    restore: Callable[[Any], QuantizedWeight]  # the same integers, scales and zero points in the standard layout
    matmul: Callable[[Tensor, Any], Tensor]  # x [..., in] -> [..., out] in x's dtype


# By the class that `prepare` returns. The first kernel that takes a weight is chosen.
KERNELS: dict[type, Kernel] = {
    int8.Int8Weight: Kernel(lambda w: int8.why_not(w) is None, int8.prepare, int8.restore, int8.matmul),
    cpu.PanelWeight: Kernel(lambda w: _on_cpu(w) and cpu.why_not(w) is None, cpu.prepare, cpu.restore, cpu.matmul),
    int4.Int4Weight: Kernel(
        lambda w: _on_cpu(w) and int4.why_not(w) is None, int4.prepare, lambda w: w.standard, _int4_matmul
    ),
    gpu.TiledWeight: Kernel(
        lambda w: not _on_cpu(w) and has_kernel(w.qweight.device, torch.float16) and gpu.why_not(w) is None,
        gpu.prepare,
        gpu.restore,
        prepared_matmul,
    ),
    QuantizedWeight: Kernel(lambda w: True, lambda w: w, lambda w: w, _matmul),
}
# A weight in any layout that `quantized_matmul` takes.
PreparedWeight = QuantizedWeight | int8.Int8Weight | cpu.PanelWeight | int4.Int4Weight | gpu.TiledWeight


def _on_cpu(weight: QuantizedWeight) -> bool:
    return weight.qweight.device.type == "cpu"


def prepare(weight: QuantizedWeight) -> PreparedWeight:
    """Repack a weight for the fastest kernel of its device. Returns the weight itself where there is none."""
    found: PreparedWeight = next(each for each in KERNELS.values() if each.takes(weight)).prepare(weight)
    return found


def restore(weight: PreparedWeight) -> QuantizedWeight:
    """Inverse of `prepare`: the same integers, scales and zero points in the standard layout."""
    return KERNELS[type(weight)].restore(weight)


def quantized_matmul(x: Tensor, weight: PreparedWeight) -> Tensor:
    """y = x · Wᵀ. x [..., in], y [..., out] in x's dtype. Differentiable in x; traceable by torch.compile."""
    return KERNELS[type(weight)].matmul(x, weight)
