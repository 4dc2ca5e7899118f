"""The stack of equal blocks of a transformers model: run a part of it, remove blocks, and adapt the config."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, without_cache, without_target
from tersor.calibrate.blocks import find_blocks
from tersor.errors import TersorError
from tersor.methods.method import Work
from tersor.methods.training.batches import joined, shapes_of

NUMBERS = ("layer_idx", "layer_id", "layer_number")  # attributes that hold a block's number


@dataclass
class Calls:
    """How a batch enters the stack."""

    hidden: Tensor  # the first block's input, [samples, tokens, hidden]
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of every block: its other arguments, by position and by name


class Stack:
    """The blocks that are left, with their names in the original. A removal changes the model at once; `finish` changes its
    config."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        units = find_blocks(model)
        paths = {unit.name.rpartition(".")[0] for unit in units}
        kinds = {type(unit.module) for unit in units}
        self.path = min(paths)
        self.config = _config_beside(model, self.path)
        count = getattr(self.config, "num_hidden_layers", None)
        if len(paths) != 1 or len(kinds) != 1 or count != len(units):
            raise TersorError(
                f"{type(model).__name__} has no single stack of equal blocks whose number its config gives: blocks are removed "
                "from models of transformers such as LLaMA, Mistral, Qwen and GPT-2"
            )
        self.blocks = [unit.module for unit in units]
        self.names = [unit.name for unit in units]

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def record(self, batches: Sequence[Batch]) -> list[Calls]:
        """Run the model on each batch, and record the inputs of every block."""
        with without_cache(self.model):
            return [self._record(batch) for batch in batches]

    def _record(self, batch: Batch) -> Calls:
        first: list[Tensor] = []
        others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            hidden = args[0] if args else kwargs["hidden_states"]
            if not first:
                first.append(hidden.detach())
            others.append((args[1:], named))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        try:
            call(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if len(others) != len(self.blocks):
            raise TersorError(f"{type(self.model).__name__} does not run each of its {len(self)} blocks once")
        return Calls(first[0], others)

    def run(self, calls: Calls, blocks: Sequence[int], hidden: Tensor) -> Tensor:
        """The hidden states after running these blocks one after another."""
        for n in blocks:
            args, kwargs = calls.others[n]
            output = self.blocks[n](hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @contextmanager
    def without(self, n: int) -> Iterator[None]:
        """Meanwhile the model runs without block n."""

        def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with self.blocks[n].register_forward_hook(skip, with_kwargs=True, prepend=True):
            yield

    def remove(self, n: int, recorded: Sequence[Calls] = ()) -> None:
        """Remove block n from the model, and from the records of batches."""
        del self.blocks[n], self.names[n]
        for calls in recorded:
            del calls.others[n]
        self.model.set_submodule(self.path, nn.ModuleList(self.blocks))
        for place, block in enumerate(self.blocks):
            for module in block.modules():
                for name in NUMBERS:
                    if isinstance(getattr(module, name, None), int):
                        setattr(module, name, place)
        for key, value in vars(self.config).items():
            if "layer" in key and isinstance(value, list) and len(value) == len(self) + 1:
                del value[n]  # lists with an entry per layer, such as layer_types
        self.config.num_hidden_layers = len(self)

    def check(self) -> None:
        """Raise TersorError where transformers would build a different model from the config."""
        root: Any = self.model
        kind = type(self.model).__name__
        try:
            with torch.device("meta"):
                fresh = type(root)(copy.deepcopy(root.config))
            again = fresh.get_submodule(self.path)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TersorError(f"the config of {kind} cannot say which blocks are left: {reason}") from None
        ours = nn.ModuleList(self.blocks)
        alike = {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
        if not alike or _plain_attributes(ours) != _plain_attributes(again):
            raise TersorError(f"the config of {kind} cannot say which blocks are left: they are not all of one kind")


def batches_of(work: Work, size: int, *, labelled: bool = False) -> list[Batch]:
    """The samples, `size` at a time; those of a batch have one length. labelled: with their labels (`target`)."""
    found: dict[Any, list[Batch]] = {}
    for sample in work.samples if labelled else map(without_target, work.samples):
        found.setdefault(shapes_of(sample), []).append(sample)
    groups = [alike[n : n + size] for alike in found.values() for n in range(0, len(alike), size)]
    return [joined(group) for group in groups]


def _config_beside(model: nn.Module, path: str) -> Any:
    """The config of the innermost module around the stack that counts layers."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "num_hidden_layers"):
            return config
    return None


def _plain_attributes(blocks: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers, switches and words that let modules of equal shape compute differently."""
    return {
        name: {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key != "training" and not key.startswith("_")
        }
        for name, module in blocks.named_modules()
    }
