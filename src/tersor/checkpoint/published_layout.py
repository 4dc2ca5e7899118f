"""Official checkpoints of our own architectures, read tensor by tensor through the model's `convert_checkpoint`.

`convert_checkpoint` takes a whole state and returns a whole state. It is run once on tensors without values that remember
how each result is made; a result's values are then computed from the few published tensors that it needs, when it is asked
for. So a checkpoint need not fit in memory, and a model file needs to know nothing of this.

    layout = recorded(module.convert_checkpoint, {"w": ((4, 2), torch.float32), ...})
    layout["q.weight"].sources              # the published names it is made of
    layout["q.weight"].compute(read)        # read(name) -> tensor
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tersor.errors import TersorError

Read = Callable[[str], Tensor]
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class ValuesNeededError(Exception):
    """A conversion looks at values, or changes a tensor in place: it cannot be recorded."""


@dataclass(frozen=True)
class Step:
    """One call of a conversion, and which of its results is meant (None: it has only one)."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    place: int | None

    def compute(self, read: Read) -> Tensor:
        def value(each: Any) -> Any:
            return compute(each, read) if isinstance(each, Recorded) else each

        result = self.function(*tree_map(value, self.arguments), **tree_map(value, self.options))
        made: Tensor = result if self.place is None else result[self.place]
        return made


class Recorded(Tensor):
    """A tensor of the meta device that knows the published tensor it is, or the step that makes it."""

    origin: str | Step

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options, name = kwargs or {}, str(getattr(func, "__name__", func))
        if re.fullmatch(r".*[^_]_|__i\w+__|__setitem__|set", name):
            raise ValuesNeededError(f"{name} changes a tensor in place")
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **options)
        except (RuntimeError, NotImplementedError) as error:
            raise ValuesNeededError(str(error)) from None
        if isinstance(result, Tensor):
            return result if isinstance(result, Recorded) else _recorded(result, Step(func, args, options, None))
        if isinstance(result, tuple | list) and any(isinstance(each, Tensor) for each in result):
            return type(result)(_recorded(each, Step(func, args, options, place)) for place, each in enumerate(result))
        return result  # a shape, a dtype, ...


def recorded(convert: Convert, published: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Recorded]:
    """The state that `convert` makes of the published tensors, by our names, without values.

    Raises ValuesNeededError where the conversion cannot be recorded.
    """
    state: dict[str, Tensor] = {
        name: _recorded(torch.empty(shape, dtype=dtype, device="meta"), name)
        for name, (shape, dtype) in published.items()
    }
    made = dict(convert(state))
    for name, tensor in made.items():
        if not isinstance(tensor, Recorded):  # made of nothing published, such as a missing buffer's value
            made[name] = _recorded(
                torch.empty_like(tensor, device="meta"), Step(lambda value=tensor: value, (), {}, None)
            )
    return made  # type: ignore[return-value]


def compute(tensor: Recorded, read: Read) -> Tensor:
    """The values of a recorded tensor."""
    origin = tensor.origin
    return read(origin) if isinstance(origin, str) else origin.compute(read)


def sources(tensor: Recorded) -> list[str]:
    """The published tensors that a recorded one is made of, in order of use, each once."""
    if isinstance(tensor.origin, str):
        return [tensor.origin]
    given = tree_flatten((tensor.origin.arguments, tensor.origin.options))[0]
    found = [name for each in given if isinstance(each, Recorded) for name in sources(each)]
    return list(dict.fromkeys(found))


def _recorded(tensor: Tensor, origin: str | Step) -> Recorded:
    if not isinstance(tensor, Tensor):
        raise TersorError(f"a checkpoint's conversion made a {type(tensor).__name__} where a tensor was expected")
    with torch._C.DisableTorchFunctionSubclass():
        made = tensor.as_subclass(Recorded)
    made.origin = origin
    return made
