"""Run a model on many samples side by side, one part of the model at a time, whatever its own code does in between.

Every sample's forward pass runs in a thread of its own and stops in front of each unit (block, embedding, head, ...). Once all
passes have arrived, the caller that iterates gets the unit and all calls to it. It may load the unit's weights, gather
statistics, replace layers, run the calls and release the weights; then the passes go on with the outputs. Exactly one thread
runs at any time, so the order of all computation is fixed.

So nothing needs to be known of a model: neither which arguments its blocks take (masks, rotary tables, position biases, encoder
states), nor what runs between them, nor whether a block is used twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.calibrate.activations import Activations
from tersor.calibrate.blocks import Unit
from tersor.calibrate.draws import PROBE, State, drawing, state
from tersor.layers.linear_map import is_linear_map


@dataclass
class Call:
    """One pass's call to a unit. `run` calls the unit as it is now."""

    sample: int  # the number of the pass
    numbers: tuple[int, ...]  # of its calibration samples, among all samples
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[..., Any]
    store: Activations
    drawn: State = field(default_factory=state)  # of the random numbers before the call; every run starts from it
    output: Any = None  # with which the pass goes on
    after: State | None = None  # of the random numbers, at the end of the last run

    def run(self) -> Any:
        self.store.get((self.args, self.kwargs))
        try:
            with drawing(self.drawn):
                output = self.forward(*self.args, **self.kwargs)
                self.after = state()
            return output
        finally:
            self.store.put((self.args, self.kwargs))

    def again(self) -> Call:
        """The same call for another run, also after this one has let its inputs go."""
        return Call(self.sample, self.numbers, self.args, self.kwargs, self.forward, self.store, self.drawn)


@dataclass
class Stop:
    """All passes that wait in front of `unit`."""

    unit: Unit
    visit: int  # how often the unit was reached before
    calls: list[Call]

    def run(self, check: Callable[[Call], None] | None = None) -> None:
        """Run every call on the unit and keep its output, letting go of the inputs. `check` sees each call with its output."""
        for call in self.calls:
            call.output = call.run()
            if check is not None:
                check(call)
            call.store.put(call.output)
            call.store.get((call.args, call.kwargs))  # the model's code may still need them, for a residual path
            call.args, call.kwargs = (), {}


class WeightsElsewhereError(RuntimeError):
    """The model's own code looked at the weights of a unit, for example for their device, while they were not in memory."""


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for any more."""


@dataclass
class _Pass:
    """One sample's forward pass in its thread."""

    sample: int
    seed: int  # of its random numbers
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waiting: tuple[Unit, Call] | None = None
    output: Any = None
    error: BaseException | None = None
    abandoned: bool = False
    thread: threading.Thread | None = None

    def stop_at(self, unit: Unit, call: Call) -> Any:
        self.waiting = (unit, call)
        self.arrived.release()
        self.go.acquire()
        if self.abandoned:
            raise _Abandoned
        self.waiting = None
        output, call.output = call.output, None
        call.store.get(output)
        return output

    def resume(self) -> None:
        """Let the pass run until it stops again or ends."""
        assert self.thread is not None
        call = None if self.waiting is None else self.waiting[1]
        with drawing(self.seed if call is None else call.after or call.drawn):  # nothing else runs meanwhile
            if not self.thread.is_alive():
                self.thread.start()
            else:
                self.go.release()
            self.arrived.acquire()
        if self.error is not None:
            raise self.error


class Lockstep:
    """Iterate over the stops of `run(sample)` for every sample; use as a context manager.

    The caller that iterates must set the output of every call of a stop (`stop.run()`) before it goes on. `outputs[sample]` is
    what a forward pass returned that ran to its end. numbers: of the calibration samples in each of `samples`; by default one
    each. seeds: of the random numbers that the model draws for each of them. scratch: a folder for activations that wait on
    disk.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        samples: Sequence[Any],
        forward: Callable[[Any], Any],
        activations: str = "device",
        numbers: Sequence[tuple[int, ...]] | None = None,
        seeds: Sequence[int] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._store = Activations(activations, scratch)
        self._numbers = numbers or [(n,) for n in range(len(samples))]
        self._units, self._forward = list(units), forward
        self._passes = [_Pass(n, PROBE if seeds is None else seeds[n]) for n in range(len(samples))]
        self._samples = samples
        self._local = threading.local()
        self._visits: dict[str, list[int]] = {}
        self.outputs: dict[int, Any] = {}

    def __enter__(self) -> Lockstep:
        for unit in self._units:
            unit.module.forward = self._gate(unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._passes:
            self.give_up(each.sample)
        for unit in self._units:
            del unit.module.forward
        self._store.close()

    def give_up(self, sample: int) -> None:
        """End one sample's pass where it is."""
        each = self._passes[sample]
        if each.thread is None or not each.thread.is_alive():
            return
        each.abandoned = True
        each.waiting = None
        each.go.release()
        each.thread.join()

    def __iter__(self) -> Iterator[Stop]:
        for each in self._passes:
            each.thread = threading.Thread(target=self._run, args=(each,), daemon=True)
            with _one_thread_for_the_rest():
                each.resume()
        while True:
            waiting = [each for each in self._passes if each.waiting is not None]
            if not waiting:
                return
            # Passes that skip a unit run ahead. The unit that comes first in the model is served first.
            order = {id(unit): n for n, unit in enumerate(self._units)}
            counts = {each.sample: self._visits.setdefault(_name(each), [0] * len(self._passes)) for each in waiting}
            first = min(waiting, key=lambda e: (counts[e.sample][e.sample], order[id(_unit(e))]))
            unit = _unit(first)
            together = [each for each in waiting if _unit(each) is unit]
            visit = counts[first.sample][first.sample]
            stop = Stop(unit, visit, [each.waiting[1] for each in together if each.waiting])
            yield stop
            for each in together:
                self._visits[unit.name][each.sample] += 1
                if each.waiting is None:
                    continue  # given up meanwhile
                with _one_thread_for_the_rest():
                    each.resume()

    def _run(self, each: _Pass) -> None:
        self._local.current = each
        torch.set_num_threads(1)  # only glue runs here; the units run in the thread that iterates
        try:
            with torch.no_grad():
                each.output = self._forward(self._samples[each.sample])
            self.outputs[each.sample] = each.output
        except _Abandoned:
            pass
        except BaseException as error:
            each.error = error
        finally:
            each.waiting = None
            each.arrived.release()

    def _gate(self, unit: Unit) -> Callable[..., Any]:
        forward = unit.module.forward
        # Hooks on an output head or an embedding (statistics, checks) see a call only where it is called as a module.
        seen = unit.module if is_linear_map(unit.module) or isinstance(unit.module, nn.Embedding) else forward

        def gate(*args: Any, **kwargs: Any) -> Any:
            current: _Pass | None = getattr(self._local, "current", None)
            if current is None:  # not one of our passes
                return forward(*args, **kwargs)
            if any(each.is_meta for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)):
                raise WeightsElsewhereError(f"{unit.name} got an input that was made from weights not in memory (meta)")
            self._store.put((args, kwargs))
            numbers = self._numbers[current.sample]
            return current.stop_at(unit, Call(current.sample, numbers, args, kwargs, seen, self._store, state()))

        return gate


def _name(each: _Pass) -> str:
    return _unit(each).name


def _unit(each: _Pass) -> Unit:
    assert each.waiting is not None
    return each.waiting[0]


class _one_thread_for_the_rest:  # noqa: N801
    """Meanwhile new threads compute with one core; this thread keeps its number of cores."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
