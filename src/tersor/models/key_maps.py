"""Key maps: published names and shapes of a checkpoint to ours. Each function takes a state and returns a new one.

state = rename(state, (r"^backbone\\.", ""), (r"\\.gamma$", ".weight"))
state = drop(state, r"relative_position_index$", r"attn_mask$")
state = squeeze_to(state, wanted)          # 1x1 convolutions that are linear maps here, and back
state = split(state, r"(.*)\\.qkv\\.(weight|bias)$", (r"\\1.q.\\2", r"\\1.k.\\2", r"\\1.v.\\2"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def rename(state: Mapping[str, Tensor], *rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> State:
    """Every rule (pattern, replacement), in order, on every key, as re.sub."""
    renamed: State = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def drop(state: Mapping[str, Tensor], *patterns: str) -> State:
    """Without the keys in which a pattern is found: index buffers and the like, which we compute ourselves."""
    return {key: value for key, value in state.items() if not any(re.search(each, key) for each in patterns)}


def squeeze_to(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> State:
    """Tensors that differ from the wanted shape only by axes of length 1 get that shape."""

    def fit(key: str, value: Tensor) -> Tensor:
        if key not in wanted or value.shape == wanted[key].shape:
            return value
        bare = [n for n in value.shape if n != 1]
        return value.reshape(wanted[key].shape) if bare == [n for n in wanted[key].shape if n != 1] else value

    return {key: fit(key, value) for key, value in state.items()}


def split(state: Mapping[str, Tensor], pattern: str, names: Sequence[str]) -> State:
    """A packed tensor (matched as a whole) as equal parts along its first axis, named by `names` with the match's groups."""
    result: State = {}
    for key, value in state.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            result[key] = value
        else:
            result |= {match.expand(name): part for name, part in zip(names, value.chunk(len(names)), strict=True)}
    return result


def pack(state: Mapping[str, Tensor], patterns: Sequence[str], name: str) -> State:
    """The inverse: tensors whose keys match the patterns, in their order, joined along the first axis under `name`."""
    result = dict(state)
    for key in state:
        match = re.fullmatch(patterns[0], key)
        if match is None:
            continue
        target = match.expand(name)
        parts = [key, *(_sibling(state, pattern, match, name, target) for pattern in patterns[1:])]
        result[target] = torch.cat([result.pop(part) for part in parts])
    return result


def _sibling(state: Mapping[str, Tensor], pattern: str, match: re.Match[str], name: str, target: str) -> str:
    for key in state:
        found = re.fullmatch(pattern, key)
        if found is not None and found.expand(name) == target:
            return key
    raise KeyError(f"no key matches {pattern} beside {match.string}")
