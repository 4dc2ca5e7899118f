"""y = x · dequant(W)ᵀ for a packed integer weight: the op, its reference, and the choice of a faster implementation.

x [..., in] floating, y [..., out] in x's dtype; the weight as in `formats.quantized_weight`. `reference` is what every
other implementation is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels.prepared_weight import PreparedWeight
from tersor.kernels.quantized_matmul_cuda import prepared_matmul


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


def quantized_matmul(x: Tensor, weight: QuantizedWeight | PreparedWeight) -> Tensor:
    """y = x · Wᵀ. x [..., in], y [..., out] in x's dtype. Differentiable in x; traceable by torch.compile.

    A weight in the checkpoint's layout goes through the reference, one that was prepared through the GPU's kernel.
    """
    if isinstance(weight, PreparedWeight):
        return prepared_matmul(x, weight)
    y: Tensor = _quantized_matmul(
        x, weight.qweight, weight.scales, weight.zeros, weight.g_idx, weight.bits, weight.group_size
    )
    return y
