"""y = x · dequant(W)ᵀ for a packed integer weight: the op, its reference, and the choice of a faster implementation.

x [..., in] floating, y [..., out] in x's dtype; the weight as in `formats.quantized_weight`. `reference` is what every
other implementation is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import prepared_weight as gpu
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.kernels import quantized_matmul_int4 as int4
from tersor.kernels.quantized_matmul_cuda import has_kernel, prepared_matmul

# what `prepare` makes; the first where there is no kernel
PreparedWeight = QuantizedWeight | cpu.PreparedWeight | int4.PreparedWeight | gpu.PreparedWeight


def reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Dequantize the whole weight to x's dtype, then one dense matmul."""
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


def prepare(weight: QuantizedWeight) -> PreparedWeight:
    """Repack a weight for the fastest kernel that its device has; the weight itself where there is none."""
    if weight.qweight.device.type == "cpu":
        if cpu.why_not(weight) is None:
            return cpu.prepare(weight)
        if int4.why_not(weight) is None:
            return int4.prepare(weight)
    elif has_kernel(weight.qweight.device, torch.float16) and gpu.why_not(weight) is None:
        return gpu.prepare(weight)
    return weight


def restore(weight: PreparedWeight) -> QuantizedWeight:
    """Inverse of `prepare`: the same integers, scales and zero points in the standard layout."""
    if isinstance(weight, cpu.PreparedWeight):
        return cpu.restore(weight)
    if isinstance(weight, int4.PreparedWeight):
        return weight.standard
    return gpu.restore(weight) if isinstance(weight, gpu.PreparedWeight) else weight


def quantized_matmul(x: Tensor, weight: PreparedWeight) -> Tensor:
    """y = x · Wᵀ. x [..., in], y [..., out] in x's dtype. Differentiable in x; traceable by torch.compile."""
    if isinstance(weight, cpu.PreparedWeight):
        return cpu.matmul(x, weight)
    if isinstance(weight, int4.PreparedWeight):
        if x.dtype == torch.bfloat16 and not (x.requires_grad and torch.is_grad_enabled()):
            return int4.matmul(x, weight)
        weight = weight.standard
    if isinstance(weight, gpu.PreparedWeight):
        return prepared_matmul(x, weight)
    y: Tensor = _quantized_matmul(
        x, weight.qweight, weight.scales, weight.zeros, weight.g_idx, weight.bits, weight.group_size
    )
    return y
