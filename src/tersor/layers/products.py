"""See and change the products of two activations that a module computes, such as q kᵀ and softmax · v of an attention.

`Products` is active while a module runs. It hands both operands of every such product to a function before they are multiplied.
PyTorch's fused attention is taken apart into its two products, because its softmax could not be seen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Functions that only multiply two tensors, each with the place of its first operand.
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
Multiply = Callable[[Tensor, Tensor], Tensor]
Seen = Callable[
    [Multiply, Tensor, Tensor, Tensor], Tensor
]  # (how they are multiplied, a, b, their product) to the product to go on with


class Products(TorchFunctionMode):
    """While active, what `operands(a, b)` returns is multiplied instead of a and b. Products with a parameter are left alone.

    seen: called with every product and its operands; the model goes on with what it returns.
    """

    def __init__(self, operands: Operands, seen: Seen | None = None) -> None:
        super().__init__()
        self.operands, self.seen = operands, seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            return attention(lambda a, b: self._product(torch.matmul, a, b), *args, **kwargs)
        first = PRODUCTS.get(func)
        if first is None or len(args) != first + 2 or not all(map(is_activation, args[first:])):
            return func(*args, **kwargs)
        return self._product(lambda a, b: func(*args[:first], a, b, **kwargs), args[first], args[first + 1])

    def _product(self, multiply: Multiply, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.operands(a, b)
        product = multiply(a, b)
        return product if self.seen is None else self.seen(multiply, a, b, product)


def is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


def attention(
    multiply: Multiply,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention step by step; `multiply` computes its two products.

    query [..., n, d], key and value [..., m, d].
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = multiply(query, key.transpose(-2, -1)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )  # [..., n, m]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout_p)
    return multiply(weights, value)
