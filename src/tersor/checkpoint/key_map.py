"""Maps published tensor names to those of the module tree, and converts published tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.tree import set_tensor, state_of
from tersor.errors import TersorError


class KeyMap:
    """Renames as transformers' conversion mapping says. Models without such a mapping keep their names."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = dict(state_of(module, ""))
        self.transforms: list[Any] = []
        self.prefix = getattr(module, "base_model_prefix", None)
        if self.prefix is not None:
            from transformers.conversion_mapping import get_model_conversion_mapping

            self.transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
        self.converters: list[Any] = [t for t in self.transforms if hasattr(t, "operations")]
        self.renamings: list[Any] = [t for t in self.transforms if not hasattr(t, "operations")]

    def runtime_name(self, key: str) -> tuple[str, int]:
        """The parameter that a published tensor goes into, and its place among the tensors that are fused there."""
        if self.prefix is None:
            return key, 0
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        kinds = next((list(c.source_patterns) for c in self.converters if pattern in c.source_patterns), [pattern])
        return str(name), kinds.index(pattern)

    def sources(self, names: Iterable[str]) -> list[str]:
        """The names under which the keys of these parameters are filed: a converter's targets are all filed under its first."""
        found = []
        for name in names:
            found.append(name)
            found.extend(first for first, targets in self._targets.items() if name in targets)
        return found

    def converted(self, keys_of: dict[str, list[str]]) -> set[str]:
        """The other parameters that a conversion makes, beside the one that its keys are filed under."""
        from itertools import chain

        self._targets: dict[str, set[str]] = {}
        for converter in self.converters:
            targets = list(converter.target_patterns)
            for name in keys_of:
                if targets[0] in name and name in self.state:
                    self._targets.setdefault(name, set()).update(
                        other
                        for other in (name.replace(targets[0], each) for each in targets[1:])
                        if other in self.state
                    )
        return set(chain.from_iterable(self._targets.values()))

    def load(self, slices: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        if self.prefix is None:
            for key, piece in slices.items():
                expected = self.state[key]
                tensor = piece[...]
                if tensor.shape != expected.shape:
                    raise TersorError(f"{key} is {tuple(tensor.shape)}; the model's is {tuple(expected.shape)}")
                own = tensor.to(device, expected.dtype if expected.is_floating_point() else None, copy=True)
                set_tensor(self.module, key, own)
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=self.transforms)
            info, _ = convert_and_load_state_dict_in_model(self.module, slices, config, None)  # type: ignore[arg-type]
        finally:
            if shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if info.mismatched_keys:
            name, got, expected = sorted(info.mismatched_keys)[0]
            raise TersorError(f"{name} is {tuple(got)}; the model's is {tuple(expected)}")
        if info.conversion_errors:
            name, reason = sorted(info.conversion_errors.items())[0]
            raise TersorError(f"{name} cannot be made from the checkpoint's tensors: {reason}")


def last_number(name: str) -> int:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    return int(numbers[-1]) if numbers else -1
