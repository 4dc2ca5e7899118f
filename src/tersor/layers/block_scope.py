"""A part of a model in which products, softmax, activations and sums are computed on blocks, not only layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tersor.formats.blocks import to_blocks
from tersor.layers.block_arithmetic import MASKED, matmul, softmax, through_table, weighted_sum
from tersor.layers.exchange import exchangeable
from tersor.layers.products import FUSED, PRODUCTS, attention, is_activation

MATMULS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
TABLES = frozenset(
    {F.gelu, F.silu, F.mish, F.elu, F.softplus, F.hardswish, F.sigmoid, F.tanh, torch.tanh, Tensor.tanh}
    | {torch.sigmoid, Tensor.sigmoid, torch.erf, Tensor.erf}
)
SUMS_AND_GATES = frozenset(
    {
        torch.add,
        torch.sub,
        torch.mul,
        Tensor.add,
        Tensor.sub,
        Tensor.mul,
        Tensor.__add__,
        Tensor.__sub__,
        Tensor.__mul__,
    }
    | {Tensor.__iadd__, Tensor.add_, Tensor.__imul__, Tensor.mul_}
)


class BlockArithmetic(TorchFunctionMode):
    """While active, computes on blocks of `columns` numbers along the last axis. The second operand of a product has its blocks
    along the axis that is summed over. The values of an attention are an exception: their blocks lie inside a token, like all
    others."""

    def __init__(self, bits: int, columns: int) -> None:
        super().__init__()
        self.blocks = partial(to_blocks, bits=bits, columns=columns, rows=1 if columns else 0)
        self.bits = bits
        self.map: torch.Size | None = None  # the shape of a softmax's result: a product with it sums over tokens

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            with self:
                return attention(torch.matmul, *args, **kwargs)
        if func in MATMULS and all(map(is_activation, args)) and min(each.dim() for each in args) > 1:
            a, b = args
            if self.map == a.shape:
                self.map = None
                return weighted_sum(a, self.blocks(b)).to(a.dtype)
            return matmul(self.blocks(a), self.blocks(b.mT.contiguous())).to(a.dtype)
        if func in PRODUCTS and all(map(is_activation, args[PRODUCTS[func] :])):
            first = PRODUCTS[func]
            return func(*args[:first], *(self.rounded(each) for each in args[first:]), **kwargs)
        if func in SOFTMAX and _is_over_last_axis(args, kwargs):
            self.map = args[0].shape
            return softmax(args[0].float(), self.bits).to(kwargs.get("dtype") or args[0].dtype)
        if func in TABLES and args and _counts(args[0]):
            x, *rest = args
            of = partial(_called, func, rest, {k: v for k, v in kwargs.items() if k != "inplace"})
            return through_table(of, self.blocks(x)).to(x.dtype)
        if func in SUMS_AND_GATES and len(args) == 2 and all(map(_counts, args)) and not any(map(_masks, args)):
            return func(*(self.rounded(each) for each in args), **kwargs)
        return func(*args, **kwargs)

    def rounded(self, x: Tensor) -> Tensor:
        return self.blocks(x).dequantize().to(x.dtype)


@exchangeable
class BlockScope(nn.Module):
    """Runs `inner` with its products, softmax, activation functions, sums and gates on blocks: their operands are put into blocks
    first. Layers in it have blocks of their own (block_map.py, block_norm.py, block_rows.py)."""

    def __init__(self, inner: nn.Module, *, bits: int, columns: int) -> None:
        super().__init__()
        self.inner, self.bits, self.columns = inner, bits, columns

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits, "columns": self.columns}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with BlockArithmetic(self.bits, self.columns):
            return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes that a model asks its blocks for (in transformers, the kind of mask) are those of `inner`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, columns={self.columns}"


def _called(func: Callable[..., Tensor], rest: list[Any], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return func(x, *rest, **kwargs)


def _counts(value: Any) -> bool:
    """Whether it is a tensor of activations, and no single number."""
    return is_activation(value) and value.dim() > 1 and value.numel() > 0 and value.shape[-1] > 1


def _masks(value: Tensor) -> bool:
    """Whether it is a mask that hides something: its large numbers would leave no bits to the others in their blocks."""
    return bool((value <= MASKED).any())


def _is_over_last_axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not args or not _counts(args[0]):
        return False
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return axis in (-1, args[0].dim() - 1)
