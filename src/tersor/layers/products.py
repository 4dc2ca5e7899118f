"""Products of two activations, wherever a module computes them: q kᵀ and softmax · v of any attention.

`Products` is active while a module runs, and hands both operands of every such product to a function before they are
multiplied. PyTorch's fused attention is taken apart into its two products, for its softmax cannot be seen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Of each, the place of the first of its two operands. All compute a product of two tensors and nothing else with them.
PRODUCTS: dict[Callable[..., Any], int] = {
    torch.matmul: 0,
    torch.bmm: 0,
    torch.einsum: 1,
    torch.baddbmm: 1,
    Tensor.matmul: 0,
    Tensor.__matmul__: 0,
    Tensor.bmm: 0,
    Tensor.baddbmm: 1,
}
FUSED = nn.functional.scaled_dot_product_attention
Operands = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Products(TorchFunctionMode):
    """While active, `operands(a, b)` gives what is multiplied instead of a and b; products with a parameter are left alone."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.operands = operands

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            return attention(self.operands, *args, **kwargs)
        first = PRODUCTS.get(func)
        if first is None or len(args) != first + 2 or not all(map(is_activation, args[first:])):
            return func(*args, **kwargs)
        return func(*args[:first], *self.operands(args[first], args[first + 1]), **kwargs)


def is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


def attention(
    operands: Operands,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention from single steps. query [..., n, d], key and value [..., m, d]."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    q, k_transposed = operands(query, key.transpose(-2, -1))
    scores = torch.matmul(q, k_transposed) * (query.shape[-1] ** -0.5 if scale is None else scale)  # [..., n, m]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout_p)
    return torch.matmul(*operands(weights, value))
