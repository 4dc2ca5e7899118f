"""Two language models with one block of each in memory: they run part by part, and parts are exchanged as they come by.

    with l of the original in the place of the compressed one, for many l in one pass:
        for every unit:  load it;  run the samples of every l on it, those of an l inside it on the other model's module

All samples wait in front of a unit (`calibrate/lockstep.py`), so a pass reads each model once. Packed layers are unpacked as they
are read, so figures differ from those of the packed kernels by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import without_cache
from tersor.calibrate.blocks import units_of
from tersor.calibrate.lockstep import Lockstep, Stop
from tersor.checkpoint.lazy_model import LazyModel, classes_of, compute_dtype
from tersor.checkpoint.load import check_tokens, load_tokenizer
from tersor.checkpoint.source import Checkpoint
from tersor.devices import DType, pick_device
from tersor.errors import TersorError
from tersor.evaluate.correspondence import Part, exchanged, is_norm_like, parts_of
from tersor.evaluate.machine import memory_available
from tersor.evaluate.measures import Measure, windows_measure
from tersor.evaluate.perplexity import check_length, windows_of

ROOM = 1.3  # of the weights of models in memory, that must be free
PART = 0.1  # of the free memory, that the predictions of one pass may take
AT_ONCE = 16  # groups at most: each sample of each group is a thread


class Walked:
    """A checkpoint with one unit at a time in memory. units: by name."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: DType, device: str) -> None:
        where = pick_device(device)
        self.lazy = LazyModel(checkpoint, dtype=compute_dtype(checkpoint, where, dtype), device=where)
        self.module = self.lazy.module.eval()
        self.units = {unit.name: unit for unit in units_of(self.module)}
        self.lazy.load_rest([unit.module for unit in self.units.values()])

    def load(self, name: str) -> None:
        self.lazy.load(self.units[name].module)

    def release(self, name: str) -> None:
        self.lazy.release(self.units[name].module)

    def bits_of(self, name: str) -> float | None:
        """The bits of a packed layer's grid; None for other layers."""
        if name not in self.lazy.quantized or self.lazy.quantization is None:
            return None
        stem = self.lazy.quantized[name][0]
        bits: Any = self.lazy.quantization.for_layer(stem, name, classes=classes_of(self.lazy.maps[name])).bits
        return float(bits) if isinstance(bits, int | float) else None


def fits(checkpoint: Checkpoint, *, copies: int, dtype: DType, device: str) -> bool:
    """Whether a model fits in memory so many times, by the headers of its files; True where the system does not say what is
    free."""
    where = pick_device(device)
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else memory_available()
    return free is None or copies * ROOM * checkpoint.bytes_in_memory(compute_dtype(checkpoint, where, dtype)) <= free


def logits_of_windows(model: Walked, windows: Tensor, *, rounded: bool) -> list[Tensor]:
    """[tokens - 1, vocabulary] of each window, of what follows each token, in one pass. rounded: with products in bfloat16."""
    where = model.lazy.device

    def cast() -> torch.autocast:
        return torch.autocast(where.type, torch.bfloat16, enabled=rounded, cache_enabled=False)

    def called(call: Callable[[nn.Module], Tensor], module: nn.Module) -> Tensor:
        with cast():  # in the thread of the pass, as around the units
            return call(module)

    measure = windows_measure(windows, "", where)
    measure = replace(measure, calls=tuple(partial(called, call) for call in measure.calls))
    with cast():
        (found,) = run(model, model, [()], measure, lambda number, logits: logits[0])
    return found


def walked_measure(base: Walked, texts: Sequence[str | Path], *, seq_len: int, max_windows: int) -> Measure:
    """Next-token distributions on windows of texts. Raises TersorError where these do not fit the model."""
    tokenizer = load_tokenizer(base.lazy.checkpoint.directory)
    windows = windows_of(texts, tokenizer, seq_len=seq_len, max_windows=max_windows)
    check_walked(base, windows, tokenizer)
    return windows_measure(windows, ", ".join(map(str, texts)), base.lazy.device)


def check_walked(model: Walked, windows: Tensor, tokenizer: Any = None) -> None:
    """Raise TersorError where the model is no causal language model by its class, or not of these tokens."""
    check_length(model.module, windows.shape[1])
    check_tokens(model.module, windows, tokenizer)


class Streamed:
    """An `Exchange` of two walked models; at_once: as many groups as the free memory has room for the predictions of."""

    def __init__(self, model: Walked, base: Walked, measure: Measure) -> None:
        self.model, self.base, self.measure = model, base, measure
        if type(model.module) is not type(base.module) or model.units.keys() != base.units.keys():
            raise TersorError(
                f"the layers of the two models do not correspond: one is {type(model.module).__name__}, the other "
                f"{type(base.module).__name__}, or their blocks are not the same; --against is the model that was compressed"
            )
        (self._reference,) = run(base, base, [()], measure, lambda number, found: found)
        each = sum(found.numel() * found.element_size() for found in self._reference)
        free = memory_available()
        self.at_once = AT_ONCE if free is None else max(1, min(AT_ONCE, int(PART * free / each)))

    def parts(self) -> list[Part]:
        @contextmanager
        def loaded(name: str) -> Iterator[None]:
            if name not in self.base.units:
                yield
                return
            for each in (self.base, self.model):
                each.load(name)
            yield
            for each in (self.base, self.model):
                each.release(name)

        found = parts_of(self.base.module, self.model.module, loaded=loaded)
        for part in (part for part in found if part.changed):
            odd = next((name for name in part.members if is_norm_like(self.base.module.get_submodule(name))), None)
            odd = odd or next((name for name in part.members if not self._unit_of(name)), None)
            if odd is not None:
                raise TersorError(
                    f"{odd} changed too, and what goes together with it is only found with both models in memory: use "
                    "--no-stream"
                )
        return [replace(part, bits=self.model.bits_of(part.members[0]) or part.bits) for part in found]

    def _unit_of(self, name: str) -> bool:
        return any(_is_in(name, unit) for unit in self.base.units)

    def total(self) -> Tensor:
        return self.distances(self.model)

    def distances(self, model: Walked) -> Tensor:
        """[samples], from the original."""
        return torch.cat(run(model, model, [()], self.measure, self._between)[0])

    def exchanged(self, groups: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
        alone = run(self.base, self.model, groups, self.measure, self._between)
        rest = run(self.model, self.base, groups, self.measure, self._between)
        return [(torch.cat(one), torch.cat(other)) for one, other in zip(alone, rest, strict=True)]

    def _between(self, number: int, found: Tensor) -> Tensor:
        return self.measure.between(self._reference[number], found)


def run(
    host: Walked,
    donor: Walked,
    groups: Sequence[Sequence[str]],
    measure: Measure,
    kept: Callable[[int, Tensor], Tensor],
) -> list[list[Tensor]]:
    """One pass through the host, in which each group of modules is the donor's in turn.

    kept: of what a call predicts (its number, and the tensor), what stays. Returns that for every group, of all calls.
    """
    samples = [(group, number) for group in range(len(groups)) for number in range(len(measure.calls))]

    def forward(sample: tuple[int, int]) -> Tensor:
        return kept(sample[1], measure.calls[sample[1]](host.module))

    with (
        torch.no_grad(),
        without_cache(host.module),
        Lockstep(host.module, list(host.units.values()), samples, forward) as passes,
    ):
        for stop in passes:
            name = stop.unit.name
            inside = [[each for each in group if _is_in(each, name)] for group in groups]
            host.load(name)
            if any(inside):
                donor.load(name)
            for number, names in enumerate(inside):
                mine = [call for call in stop.calls if samples[call.sample][0] == number]
                _run(Stop(stop.unit, stop.visit, mine), host.module, donor.module, names)
            host.release(name)
            if any(inside) and donor is not host:
                donor.release(name)
    count = len(measure.calls)
    return [[passes.outputs[group * count + number] for number in range(count)] for group in range(len(groups))]


def _run(stop: Stop, host: nn.Module, donor: nn.Module, names: Sequence[str]) -> None:
    """The calls of one group. names: of the donor's modules inside the unit, or of the unit itself."""
    if stop.unit.name in names:
        for call in stop.calls:
            call.forward = donor.get_submodule(stop.unit.name)
        stop.run()
        return
    with exchanged(host, donor, names):
        stop.run()


def _is_in(name: str, unit: str) -> bool:
    return not unit or name == unit or name.startswith(f"{unit}.")
