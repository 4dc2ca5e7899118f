"""Walk a model block by block, wherever its weights come from and its results go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.calibrate.batches import Batch, bundles, call, first_tensor, joined
from tersor.calibrate.blocks import Unit, units_of
from tersor.calibrate.draws import PROBE
from tersor.calibrate.lockstep import Call, Lockstep, Stop
from tersor.calibrate.parallel import sample_number, share
from tersor.calibrate.statistics import Original, kind_of, watch_inputs
from tersor.compress.in_memory import Source
from tersor.compress.plan import Plan, without
from tersor.compress.settings import Job
from tersor.errors import NotFiniteError, TersorError
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import computes_its_own, packable_maps
from tersor.layers.quantized_embedding import looks_up, why_not_packed
from tersor.methods.block import Block
from tersor.progress import Progress

Compress = Callable[[Unit, Sequence[Call], Original | None], Block]


@dataclass
class FirstPass:
    """What the first run of a model showed of its cost."""

    seconds: dict[str, float] = field(default_factory=dict)  # by unit, to run it on the probe
    loading: float = 0.0  # seconds to read all weights
    # By unit: its maps in order, those of one input together.
    inputs: dict[str, list[list[str]]] = field(default_factory=dict)
    arguments: list[Tensor] = field(default_factory=list)  # of the first block, on the meta device


@dataclass
class Probe:
    """The sample whose outputs are compared, and what its run through the original showed."""

    batch: Batch
    units: list[Unit]
    visits: Counter[str]  # how often each unit is reached
    called: set[str]  # kinds of layers (names without numbers) that compute W x + b, or look rows up
    before: Tensor | None  # what the original computes of it
    after: Tensor | None = None  # what the compressed model computes of it; known at the end of the walk
    cost: FirstPass = field(default_factory=FirstPass)

    def is_called(self, name: str) -> bool:
        """Whether a layer is called, and computes W x + b or looks rows up. A block may also just read its weight."""
        return kind_of(name) in self.called


@dataclass(frozen=True)
class Prepared:
    """What a walk needs to know, found by running the probe."""

    plan: Plan
    batches: list[Batch]  # the samples as the model takes them
    probe: Probe | None  # None: nothing is run, because no method needs samples
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # H_O of layers, where a method asks


def trace(source: Source, batch: Batch, progress: Progress, *, held_out: bool = True) -> Probe:
    """Run a sample through the model as it is, a unit at a time. held_out: whether it is none of the calibration samples, else it
    is the first. Raises TersorError where weights or outputs are not finite."""
    units = units_of(source.module)
    elsewhere = [unit.module for unit in units if not unit.is_block and _is_absent(unit.module)]
    try:
        return _trace(source, units, batch, progress, held_out=held_out)
    except RuntimeError:
        if not elsewhere:
            raise
    # Some module may use the weights of another without calling it: keep everything outside the blocks in memory.
    for module in elsewhere:
        source.load(module)
    try:
        return _trace(source, [unit for unit in units if unit.is_block], batch, progress, held_out=held_out)
    except BaseException:
        for module in elsewhere:
            source.release(module)
        raise


def _is_absent(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _trace(source: Source, units: list[Unit], batch: Batch, progress: Progress, *, held_out: bool) -> Probe:
    visits: Counter[str] = Counter()
    called: set[str] = set()
    cost = FirstPass()
    numbers: list[tuple[int, ...]] = [() if held_out else (0,)]
    with Lockstep(source.module, units, [batch], lambda batch: call(source.module, batch), numbers=numbers) as passes:
        for stop in passes:
            began = time.perf_counter()
            source.load(stop.unit.module)
            cost.loading += time.perf_counter() - began
            _check_weights(stop.unit)
            visits[stop.unit.name] += 1
            if stop.unit.is_block and not cost.arguments:
                given = tree_leaves([(each.args, each.kwargs) for each in stop.calls])
                cost.arguments = [each.to("meta") for each in given if isinstance(each, Tensor)]
            began = time.perf_counter()
            with _watching_linear_maps(stop.unit, called, cost) as watched:
                _run_checked(stop)  # waits for a GPU
            took = time.perf_counter() - began - watched[0]
            cost.seconds[stop.unit.name] = cost.seconds.get(stop.unit.name, 0.0) + took
            source.release(stop.unit.module)
            progress("checking the model", sum(visits.values()), max(len(units), sum(visits.values())))
    return Probe(batch, units, visits, called, first_tensor(passes.outputs.get(0)), cost=cost)


def called_only(plan: Plan, probe: Probe) -> Plan:
    """The plan without layers that are not called. Raises TersorError for an embedding: the user asked for it by name."""
    lost = {name: each for name, each in plan.all_linears().items() if not probe.is_called(name)}
    for name, each in lost.items():
        if isinstance(each, nn.Embedding):
            raise TersorError(
                f"the embedding {name} does more than look up rows, or the samples do not reach it; leave --embeddings out"
            )
    return without(plan, set(lost))


@contextmanager
def _watching_linear_maps(unit: Unit, called: set[str], cost: FirstPass) -> Iterator[list[float]]:
    """Note the kinds of maps that are called, and which read one input. Yields the seconds that the watching took, in a list."""
    watched, previous = [0.0], [None]
    groups = cost.inputs.setdefault(unit.name, [])

    def watch(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            began = time.perf_counter()
            look(module, args, output)
            watched[0] += time.perf_counter() - began

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if args else None
            if groups and x is not None and x is previous[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            previous[0] = x
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
    experts = {name: each for name, each in maps.items() if isinstance(each, ExpertMap)}
    with ExitStack() as hooks, watch_inputs(experts, lambda name, x: called.add(kind_of(name))):
        for name, each in maps.items():
            if isinstance(each, nn.Module):
                hooks.enter_context(each.register_forward_hook(watch(name)))
        yield watched


def walk(
    source: Source, first: Prepared, job: Job, restore: Callable[[Block], bool], scratch: Path | None = None
) -> Generator[Block]:
    """Compress every planned block, and yield it when it is finished. At the end the probe holds the compressed model's output.

    A block that the model uses more than once is compressed at its last use, with the calls of all uses. Several processes that
    walk together run a share of the samples each. restore: puts back a block that an earlier run finished; False where none did.
    scratch: a folder for activations.
    """
    stored = None if job.layout is None else job.layout.stored(source.stored_dtype)
    hessian_dtype = torch.float64 if source.dtype == torch.float64 else torch.float32

    def compressed(unit: Unit, calls: Sequence[Call], original: Original | None) -> Block:
        linears = first.plan.linears[unit.name]
        block = Block(
            unit.name,
            unit.module,
            linears,
            calls,
            stored,
            hessian_dtype,
            job.routing,
            original=original,
            outputs=first.outputs,
        )
        if not restore(block):
            for method, names in first.plan.by_method(block.name).items():
                method.compress_block(block.part(names))
        return block

    if first.probe is None:
        return _walk_without_samples(source, first.plan, job.progress, compressed)
    return _walk(source, first, first.probe, job, compressed, scratch)


def _walk(
    source: Source, first: Prepared, probe: Probe, job: Job, compressed: Compress, scratch: Path | None
) -> Generator[Block]:
    model, plan = source.module, first.plan
    mine = share(first.batches)
    together = bundles(mine)
    passing = [joined([mine[n] for n in bundle]) for bundle in together]
    numbers = [tuple(map(sample_number, bundle)) for bundle in together]
    seeds = [1 + each[0] for each in numbers]
    last = len(passing)  # the probe's pass
    compares = any(method.compares for method in plan.methods.values())
    originals = passing if compares else []  # these also run through the original model
    remaining = {name for name, linears in plan.linears.items() if linears and probe.visits[name]}
    total = len(remaining)
    earlier: dict[str, list[Call]] = {}
    exact: dict[str, list[Call | None]] = {}  # the original's calls, one for each of those
    with Lockstep(
        model,
        probe.units,
        [*passing, probe.batch, *originals],
        lambda batch: call(model, batch),
        job.activations,
        [*numbers, (), *numbers[: len(originals)]],
        [*seeds, PROBE, *seeds[: len(originals)]],
        scratch,
    ) as passes:
        for stop in passes:
            name = stop.unit.name
            if not remaining:
                for sample in (*range(last), *range(last + 1, last + 1 + len(originals))):
                    passes.give_up(sample)
                stop.calls = [each for each in stop.calls if each.sample == last]
            source.load(stop.unit.module)
            if name in remaining:
                calls = [each.again() for each in stop.calls if each.sample < last]
                if compares:
                    beside = {each.sample - last - 1: each.again() for each in stop.calls if each.sample > last}
                    exact.setdefault(name, []).extend(beside.get(each.sample) for each in calls)
                calls = earlier.pop(name, []) + calls
                if stop.visit + 1 < probe.visits[name]:
                    earlier[name] = calls
                    stop.run()
                else:
                    job.progress(f"compressing {name or 'the model'}", total - len(remaining), total)
                    original = _original(stop.unit, exact.pop(name)) if compares else None
                    block = compressed(stop.unit, calls, original)
                    if original is not None:
                        _run_originals(stop, original, last)
                    _run_checked(stop)
                    yield block
                    del block, calls, original  # so that they are not in memory while the next is solved
                    remaining.discard(name)
                    job.progress(f"compressed {name or 'the model'}", total - len(remaining), total)
            else:
                stop.run()
            source.release(stop.unit.module)
    probe.after = first_tensor(passes.outputs.get(last))


def _original(unit: Unit, calls: Sequence[Call | None]) -> Original:
    """A block as it is before it is compressed."""
    weights = {name: each.detach().clone() for name, each in unit.module.named_parameters()}
    return Original(unit.module, weights, calls)


def _run_originals(stop: Stop, original: Original, last: int) -> None:
    """Run the calls of the original model's passes, which come after the last. The other calls stay in the stop."""
    with original.weights_in_place():
        Stop(stop.unit, stop.visit, [each for each in stop.calls if each.sample > last]).run()
    stop.calls = [each for each in stop.calls if each.sample <= last]


def _walk_without_samples(source: Source, plan: Plan, progress: Progress, compressed: Compress) -> Generator[Block]:
    for n, unit in enumerate(plan.blocks):
        progress(f"compressing {unit.name or 'the model'}", n, len(plan.blocks))
        source.load(unit.module)
        _check_weights(unit)
        yield compressed(unit, [], None)
        source.release(unit.module)
    progress("compressed", len(plan.blocks), len(plan.blocks))


def _check_weights(unit: Unit) -> None:
    for name, parameter in unit.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NotFiniteError(f"the weight {unit.name}.{name} is not finite (NaN or Inf)")


def _run_checked(stop: Stop) -> None:
    """Run the stop's calls. Raises NotFiniteError, naming the sample, where an output is not finite."""
    finite: list[tuple[Call, torch.dtype, Tensor]] = []  # read only in the end, because reading waits for a GPU

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
    where = f"calibration sample {call.numbers[row]}" if call.numbers else "the text that the result is compared on"
    raise NotFiniteError(
        f"the output of {stop.unit.name or 'the model'} is not finite (NaN or Inf) in {where}; if the model overflows "
        f"{dtype}, use --dtype float32"
    )
