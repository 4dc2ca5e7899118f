"""Activation functions by the names that published configs use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.checks import one_of

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,  # exact, by erf
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),  # GPT-2's name of it
    "silu": F.silu,
    "swish": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "identity": lambda x: x,
}


class Activate(nn.Module):
    """An activation as a module, for use in an nn.Sequential. It has no state; its `repr` is its name."""

    def __init__(self, name: str, *, of: str) -> None:
        super().__init__()
        self.name, self.function = name, activation(name, of=of)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def activation(name: str, *, of: str) -> Activation:
    """The function called `name`. of: the model whose option it is. Raises TersorError for an unknown name."""
    one_of(of, "activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
