"""Experts that a mixture keeps fused in one 3-D parameter, each seen as a linear map of its own.

transformers holds the experts of a layer as parameters [experts, out, in] (or [experts, in, out], "transposed"), and its plain
forward computes with slices of them: `F.linear(x, stack[e])`, `x @ stack[e]`, or `torch.bmm(x, stack)` over all. `ExpertMap` is
one slice, for solvers. `ExpertCalls` sees the inputs of every slice while the model's own code runs. `PackedExperts` replaces the
parameter once the slices are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR = (torch.nn.functional.linear,)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
BMM = (torch.bmm, Tensor.bmm)


@dataclass(eq=False)
class ExpertMap:
    """Expert `index` of the stack `owner.<stack>`. Not a module: it lives in its owner's parameter."""

    owner: nn.Module
    stack: str
    index: int
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """A view of the stack as it is now: [out, in], or [in, out] where it is transposed."""
        weight: Tensor = getattr(self.owner, self.stack)[self.index]
        return weight


def expert_maps(module: nn.Module) -> dict[str, ExpertMap]:
    """Every expert of every fused stack directly in `module`, as `<stack>.<index>`."""
    experts = getattr(module, "num_experts", None)
    stacks = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] == experts and "bias" not in name
    }
    transposed = is_transposed(module, [stack.shape for stack in stacks.values()])
    return {
        f"{name}.{index}": ExpertMap(module, name, index, transposed)
        for name, stack in stacks.items()
        for index in range(stack.shape[0])
    }


def stored_name(name: str, found: object) -> str:
    """The name under which a linear map is stored: `<experts>.<number>.<stack>` for an expert of a fused stack."""
    if not isinstance(found, ExpertMap):
        return name
    return f"{name.rsplit('.', 2)[0]}.{found.index}.{found.stack}"


def is_transposed(module: nn.Module, shapes: Sequence[torch.Size]) -> bool:
    """Whether slices are [in, out]. Where the module does not say, the shapes do: an expert's last map returns what its first
    takes, so with slices [out, in] the first stack has as many columns as the last has rows."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool) or len(shapes) < 2:
        return bool(said)
    first, last = shapes[0], shapes[-1]
    return first[2] != last[1] and first[1] == last[2]


class ExpertCalls(TorchFunctionMode):
    """While active, calls note(name, x) for every product of an input with a slice of the given experts."""

    def __init__(self, experts: dict[str, ExpertMap], note: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._note = note
        self._names = {(id(each.owner), each.stack, each.index): name for name, each in experts.items()}
        self._owners = {(id(each.owner), each.stack): each.owner for each in experts.values()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if (func in LINEAR or func in MATMUL) and len(args) > 1 and isinstance(args[1], Tensor):
            self._see(args[0], args[1])
        elif func in BMM and len(args) > 1 and isinstance(args[1], Tensor):
            for e, x in enumerate(args[0]):
                self._see(x[x.any(-1)], args[1][e])  # without the rows of zeros: tokens of other experts
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, weight: Tensor) -> None:
        for (owner, stack), module in self._owners.items():
            parameter: Tensor = getattr(module, stack)
            if weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr() and weight.dim() == 2:
                index = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                name = self._names.get((owner, stack, index))
                if name is not None:
                    self._note(name, x)


class PackedExperts(nn.Module):
    """Takes the place of a fused parameter; `stack[e]` is a weight that F.linear, @ and (for the whole) bmm understand.

    linears: one module per expert, each [in] -> [out].
    """

    def __init__(self, linears: Sequence[nn.Module], *, transposed: bool) -> None:
        super().__init__()
        self.linears, self.transposed = nn.ModuleList(linears), transposed

    @property
    def shape(self) -> torch.Size:
        first: Any = self.linears[0]
        size = (first.in_features, first.out_features) if self.transposed else (first.out_features, first.in_features)
        return torch.Size((len(self.linears), *size))

    def __getitem__(self, index: int | Tensor) -> PackedExpert:
        return PackedExpert(self.linears[int(index)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in BMM and isinstance(args[1], PackedExperts):
            return torch.stack([linear(x) for linear, x in zip(args[1].linears, args[0], strict=True)])
        return NotImplemented


class PackedExpert:
    """One expert's weight, for use as the second operand of a product."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if (func in LINEAR or func in MATMUL) and isinstance(args[1], PackedExpert):
            y = args[1].linear(args[0])
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return y if bias is None else y + bias
        return NotImplemented
