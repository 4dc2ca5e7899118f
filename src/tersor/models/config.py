"""Model configs (frozen dataclasses) from plain dicts and back, as config.json and golden cases hold them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tersor.errors import TersorError
from tersor.untrusted import check_number

Config = TypeVar("Config")


def config_from_dict(config_class: type[Config], values: Mapping[str, Any], *, of: str) -> Config:
    """JSON's lists become tuples, dicts become the nested config where a field is one. `of` names the model in errors.

    A nested config is only given in part where `values` says so: the rest are the nested class's defaults.
    """
    types = typing.get_type_hints(config_class)
    known = [f.name for f in dataclasses.fields(config_class) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"its options are {', '.join(known)}"
            raise TersorError(f"{of} has no option {key!r}; {hint}")
    return config_class(**{key: _value(types[key], value, f"{of}.{key}") for key, value in values.items()})


def checked_config(config_class: type[Config], values: Mapping[str, Any], section: str) -> Config:
    """As `config_from_dict`, and every value must be of the kind of its field's default: what a user wrote by hand."""
    for each in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if each.name not in values:
            continue
        value, default = values[each.name], each.default
        check_number(f"{section}.{each.name}", value)
        wanted: Any = type(default)
        if isinstance(default, float):
            wanted = (int, float)
        elif isinstance(default, tuple):
            wanted = (list, tuple)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise TersorError(f"{section}.{each.name} is {value!r}, a value such as {default!r} is expected")
    return config_from_dict(config_class, values, of=section)


def config_to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _value(wanted: Any, value: Any, of: str) -> Any:
    if isinstance(value, Mapping):
        for option in (wanted, *typing.get_args(wanted)):  # get_args: `AttentionConfig | None`
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                return config_from_dict(option, value, of=of)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
