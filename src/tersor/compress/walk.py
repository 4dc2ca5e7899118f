"""Walk a model block by block: the part of a job that does not care where weights come from or where results go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, bundles, call, first_tensor, joined
from tersor.calibrate.blocks import Unit, find_units
from tersor.calibrate.draws import PROBE
from tersor.calibrate.lockstep import Call, Lockstep, Stop
from tersor.calibrate.parallel import sample_number, share
from tersor.calibrate.routing import Routing
from tersor.calibrate.statistics import kind_of, watch_inputs
from tersor.compress.plan import Plan, without
from tersor.errors import NotFiniteError, TersorError
from tersor.formats.grid import Stored
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import computes_its_own, packable_maps
from tersor.layers.quantized_embedding import looks_up, why_not_packed
from tersor.methods.block import Block
from tersor.methods.method import Progress


@dataclass
class Hooks:
    """What a walk calls: load and release a unit's weights; `restore` a block that an earlier run finished (False: it did
    not); `finished` with each solved block."""

    load: Callable[[nn.Module], None]
    release: Callable[[nn.Module], None]
    restore: Callable[[Block], bool]
    finished: Callable[[Block], None]
    progress: Progress
    activations: str = "device"


@dataclass
class Trace:
    """One run of the model: its units, how often each is reached, which layers are called, and the output.

    called: kinds of linear layers and embeddings (names with numbers left out) that are called and compute W x + b, or look
    rows up; a layer whose block reads its weight without calling it, or whose class computes something else, is none of them.
    """

    units: list[Unit]
    visits: Counter[str]
    called: set[str]
    output: Any

    def is_called(self, name: str) -> bool:
        return kind_of(name) in self.called


def trace(model: nn.Module, probe: Batch, hooks: Hooks) -> Trace:
    """Run the probe through the model as it is, a unit at a time. Raises TersorError where weights or outputs are not finite."""
    units = units_of(model)
    try:
        return _trace(model, units, probe, hooks)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    # Some module uses the weights of another without calling it: keep all that lies outside the blocks in memory.
    for unit in units:
        if not unit.is_block:
            hooks.load(unit.module)
    return _trace(model, [unit for unit in units if unit.is_block], probe, hooks)


def _trace(model: nn.Module, units: list[Unit], probe: Batch, hooks: Hooks) -> Trace:
    visits: Counter[str] = Counter()
    called: set[str] = set()
    with Lockstep(model, units, [probe], lambda batch: call(model, batch)) as passes:
        for stop in passes:
            hooks.load(stop.unit.module)
            _check_weights(stop.unit)
            visits[stop.unit.name] += 1
            with _watching_linear_maps(stop.unit, called):
                _run_checked(stop)
            hooks.release(stop.unit.module)
            hooks.progress("checking the model", sum(visits.values()), max(len(units), sum(visits.values())))
    return Trace(units, visits, called, passes.outputs.get(0))


def called_only(plan: Plan, traced: Trace) -> Plan:
    """The plan without layers that are not called. Raises TersorError for an embedding, which was asked for as such."""
    lost = {name: each for name, each in plan.all_linears().items() if not traced.is_called(name)}
    for name, each in lost.items():
        if isinstance(each, nn.Embedding):
            raise TersorError(
                f"the embedding {name} does more than look up rows, or the samples do not reach it; leave --embeddings out"
            )
    return without(plan, set(lost))


@contextmanager
def _watching_linear_maps(unit: Unit, called: set[str]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Embedding):
                if computes_its_own(module) and not (args and looks_up(module, args[0], output)):
                    return
            elif computes_its_own(module):
                expected = nn.functional.linear(args[0], module.weight, module.bias)  # type: ignore[arg-type]
                if not isinstance(output, Tensor) or not torch.allclose(output, expected, 1e-3, 1e-4):
                    return
            called.add(kind_of(name))

        return after

    maps = {".".join(filter(None, (unit.name, n))): each for n, each in packable_maps(unit.module).items()}
    maps = {n: each for n, each in maps.items() if not (isinstance(each, nn.Embedding) and why_not_packed(each))}
    handles = [each.register_forward_hook(watch(n)) for n, each in maps.items() if isinstance(each, nn.Module)]
    experts = {name: each for name, each in maps.items() if isinstance(each, ExpertMap)}
    try:
        with watch_inputs(experts, lambda name, x: called.add(kind_of(name))):
            yield
    finally:
        for handle in handles:
            handle.remove()


def walk(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    probe: Batch,
    traced: Trace,
    stored: Stored | None,
    hessian_dtype: torch.dtype,
    routing: Routing,
    hooks: Hooks,
) -> Any:
    """Compress every planned block; returns the probe's output from the compressed model.

    A block that the model uses more than once is compressed at its last use, from the samples of all uses. Where several
    processes walk together, each runs its share of the samples.
    """
    mine = share(batches)
    together = bundles(mine)
    passing = [joined([mine[n] for n in bundle]) for bundle in together]
    numbers = [tuple(map(sample_number, bundle)) for bundle in together]
    last = len(passing)  # the probe's pass
    remaining = {name for name, linears in plan.linears.items() if linears and traced.visits[name]}
    total = len(remaining)
    earlier: dict[str, list[Call]] = {}
    with Lockstep(
        model,
        traced.units,
        [*passing, probe],
        lambda batch: call(model, batch),
        hooks.activations,
        [*numbers, (sample_number(len(mine)),)],
        [*(1 + each[0] for each in numbers), PROBE],
    ) as passes:
        for stop in passes:
            name = stop.unit.name
            if not remaining:
                for sample in range(last):
                    passes.give_up(sample)
                stop.calls = [each for each in stop.calls if each.sample == last]
            hooks.load(stop.unit.module)
            if name in remaining:
                calls = [each.again() for each in stop.calls if each.sample != last]
                calls = earlier.pop(name, []) + calls
                if stop.visit + 1 < traced.visits[name]:
                    earlier[name] = calls
                    stop.run()
                else:
                    hooks.progress(f"compressing {name or 'the model'}", total - len(remaining), total)
                    block = Block(name, stop.unit.module, plan.linears[name], calls, stored, hessian_dtype, routing)
                    if not hooks.restore(block):
                        _compress(block, plan)
                    _run_checked(stop)
                    hooks.finished(block)
                    remaining.discard(name)
                    hooks.progress(f"compressed {name or 'the model'}", total - len(remaining), total)
            else:
                stop.run()
            hooks.release(stop.unit.module)
    return passes.outputs.get(last)


def _compress(block: Block, plan: Plan) -> None:
    """Let each method take its layers, one method after another."""
    for method, names in plan.by_method(block.name).items():
        method.compress_block(block.part(names))


def walk_without_samples(
    model: nn.Module, plan: Plan, stored: Stored | None, hessian_dtype: torch.dtype, hooks: Hooks
) -> None:
    """Compress every planned block with methods that need no samples."""
    for n, unit in enumerate(plan.blocks):
        hooks.progress(f"compressing {unit.name or 'the model'}", n, len(plan.blocks))
        hooks.load(unit.module)
        _check_weights(unit)
        block = Block(unit.name, unit.module, plan.linears[unit.name], [], stored, hessian_dtype, Routing())
        if not hooks.restore(block):
            _compress(block, plan)
        hooks.finished(block)
        hooks.release(unit.module)
    hooks.progress("compressed", len(plan.blocks), len(plan.blocks))


def units_of(model: nn.Module) -> list[Unit]:
    """The units of a model; the whole model as one block where nothing is repeated."""
    units = find_units(model)
    return units if any(unit.is_block for unit in units) else [Unit("", model, True)]


def run(model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch], hooks: Hooks) -> list[Any]:
    """The outputs of all batches from a model that is loaded unit by unit."""
    with Lockstep(model, units, batches, lambda batch: call(model, batch)) as passes:
        for n, stop in enumerate(passes):
            hooks.load(stop.unit.module)
            stop.run()
            hooks.release(stop.unit.module)
            hooks.progress("running", n + 1, max(len(units), n + 1))
    return [passes.outputs.get(n) for n in range(len(batches))]


def _check_weights(unit: Unit) -> None:
    for name, parameter in unit.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NotFiniteError(f"the weight {unit.name}.{name} is not finite (NaN or Inf)")


def _run_checked(stop: Stop) -> None:
    """Run the stop's calls. Raises NotFiniteError, naming the sample, where an output is not finite."""
    finite: list[tuple[Call, torch.dtype, Tensor]] = []  # looked at in the end: a look waits for a GPU

    def note(each: Call) -> None:
        output = first_tensor(each.output)
        if output is not None:
            found = torch.isfinite(output)
            finite.append((each, output.dtype, found.flatten(1).all(1) if found.dim() > 1 else found.all()[None]))

    stop.run(note)
    if not finite or bool(torch.cat([flags for *_, flags in finite]).all()):
        return
    call, dtype, flags = next(each for each in finite if not bool(each[2].all()))
    row = flags.tolist().index(False) if len(flags) == len(call.numbers) else 0
    raise NotFiniteError(
        f"the output of {stop.unit.name or 'the model'} is not finite (NaN or Inf) in calibration sample "
        f"{call.numbers[row]}; if the model overflows {dtype}, use --dtype float32"
    )
