"""Modules that a method puts in place of others, and how a checkpoint records them.

The `describe()` of a class marked with `@exchangeable` returns what is needed to build it, as JSON values. config.json lists it
under `tersor_exchanged`: {module name: {"kind": the file in this folder that holds the class, ...}}. Loading builds the
original's module tree, replaces the listed modules (`in_place_of`, on the meta device), and then reads tensors by their names,
as for any other module.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from torch import nn

from tersor.errors import TersorError

EXCHANGED = "tersor_exchanged"  # the key in config.json


class Exchangeable(Protocol):
    """What an exchangeable class has. `describe()` returns the keyword arguments of `in_place_of`.

    A module with packed weights has an attribute `packed_parameters`: how many weights these are.
    """

    def describe(self) -> dict[str, Any]: ...

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        """A module of the described kind with `original`'s shape, device and dtype. Its weights may be anything: they are read
        afterwards."""
        ...


Kind = TypeVar("Kind", bound="type[nn.Module]")
_KINDS: dict[str, type[nn.Module]] = {}


def exchangeable(kind: Kind) -> Kind:
    """Mark a class. A file holds one such class, and the file's name is the kind."""
    _KINDS[kind.__module__.rpartition(".")[2]] = kind
    return kind


def exchangeable_kinds() -> frozenset[type[nn.Module]]:
    """The marked classes that have been imported."""
    return frozenset(_KINDS.values())


def exchanged_in(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The list for config.json: every exchanged module by name, outer ones first."""
    names = {kind: name for name, kind in _KINDS.items()}
    return {
        name: {"kind": names[type(module)], **cast(Exchangeable, module).describe()}
        for name, module in model.named_modules()
        if type(module) in names
    }


def exchange(model: nn.Module, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the modules that config.json lists. Raises TersorError where a kind or a module is unknown."""
    for name, described in listed.items():
        rest = {key: value for key, value in described.items() if key != "kind"}
        kind = cast("type[Exchangeable]", _kind(str(described.get("kind")), name))
        try:
            original = model.get_submodule(name)
        except AttributeError:
            raise TersorError(f"config.json exchanges {name}, which {type(model).__name__} does not have") from None
        try:
            model.set_submodule(name, kind.in_place_of(original, **rest))
        except TypeError as error:
            raise TersorError(f"config.json's {EXCHANGED} of {name} does not fit: {error}") from None


def _kind(kind: str, place: str) -> type[nn.Module]:
    if kind not in _KINDS and kind.isidentifier() and importlib.util.find_spec(f"tersor.layers.{kind}"):
        importlib.import_module(f"tersor.layers.{kind}")
    if kind not in _KINDS:
        raise TersorError(f"config.json has a {kind!r} in the place of {place}, a kind that this tersor does not know")
    return _KINDS[kind]
