"""Find the layers that cost most, in the time given: blocks first, then the layers of the costly blocks.

A group of layers is measured by putting its compressed modules into the original, and the original's into the compressed model
(`attribution.py` says what that gives). Where the blocks are so many that measuring each would take more than half of the
time, halves of the model are measured first, the more costly half is halved again, and so on. Groups are taken in the order of
their cost: when the time is over, those that cost least are left. Every measurement is kept in a state file, from which the
next call goes on.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.hashes import hash_of_json
from tersor.checkpoint.room import read_object
from tersor.errors import TersorError
from tersor.evaluate.attribution import Attribution, Row
from tersor.evaluate.correspondence import Part, exchanged, parts_of
from tersor.evaluate.interval import half_width
from tersor.evaluate.measures import Measure, Meter
from tersor.files import replacing
from tersor.progress import Progress, silent
from tersor.version import __version__

BY = ("layer", "block")
SHARE = 0.5  # of the time, that measuring all blocks may take
STATE = "attribution-state"


@dataclass(frozen=True)
class Group:
    """Parts that are exchanged together: a layer, a block, or a run of blocks."""

    parts: tuple[Part, ...]
    blocks: tuple[tuple[Part, ...], ...] = ()  # of a run of several: each

    @property
    def members(self) -> list[str]:
        return [name for part in self.parts if part.changed for name in part.members]

    @property
    def key(self) -> str:
        return hash_of_json(sorted(self.members))[:16]


@dataclass
class State:
    """What was measured, by group: the distances of each sample."""

    path: Path | None  # None where nothing is kept
    fingerprint: str
    flat: bool | None = None  # whether all blocks are measured one by one
    measured: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def save(self) -> None:
        if self.path is None:
            return
        said = {"kind": STATE, "fingerprint": self.fingerprint, "flat": self.flat, "measured": self.measured}
        with disk_errors(self.path), replacing(self.path) as partial:
            partial.write_text(json.dumps(said))


def open_state(path: Path | None, fingerprint: str) -> State:
    """What an earlier call left. Raises TersorError where the file holds something else."""
    if path is None or not path.exists():
        return State(path, fingerprint)
    found = read_object(path)
    if found is None or found.get("kind") != STATE:
        raise TersorError(f"{path} exists and holds no unfinished attribution: move it, or give another --out")
    if found.get("fingerprint") != fingerprint:
        raise TersorError(
            f"{path} holds an unfinished attribution of other models, other samples or another --by: remove it, or give "
            "another --out"
        )
    return State(path, fingerprint, found["flat"], found["measured"])


class Exchange(Protocol):
    """Two models whose parts can be exchanged. at_once: groups that are measured together, where that is cheaper."""

    measure: Measure
    at_once: int

    def parts(self) -> list[Part]: ...

    def total(self) -> Tensor:
        """[samples]: the distances of the compressed model."""
        ...

    def exchanged(self, groups: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
        """Of each group of modules: the distances of the original with the compressed ones, and of the reverse."""
        ...


class InMemory:
    """Two modules on one device."""

    at_once = 1

    def __init__(self, model: nn.Module, base: nn.Module, meter: Meter) -> None:
        self.model, self.base, self.meter, self.measure = model, base, meter, meter.measure

    def parts(self) -> list[Part]:
        return parts_of(self.base, self.model, self.meter.first_call)

    def total(self) -> Tensor:
        return self.meter(self.model)

    def exchanged(self, groups: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for names in groups:
            with exchanged(self.base, self.model, names):
                alone = self.meter(self.base)
            with exchanged(self.model, self.base, names):
                found.append((alone, self.meter(self.model)))
        return found


def attribute(
    model: nn.Module,
    base: nn.Module,
    meter: Meter,
    *,
    names: tuple[str, str] = ("model", "base"),
    by: str = "layer",
    seconds: float | None = None,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Attribution:
    """`attributed` of two modules on one device, which are as before when it returns or raises. meter: from `base`."""
    return attributed(
        InMemory(model, base, meter),
        names=names,
        by=by,
        seconds=seconds,
        state=state,
        fingerprint=fingerprint,
        progress=progress,
    )


def attributed(
    exchange: Exchange,
    *,
    names: tuple[str, str] = ("model", "base"),
    by: str = "layer",
    seconds: float | None = None,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Attribution:
    """What each layer (or block) of the compressed model costs.

    names: what the two models are called. seconds: None for as long as it takes; at least one group is measured. state: the
    file that keeps what was measured, which the caller removes when the result is kept; fingerprint: of the two models.
    Raises TersorError where the layers do not correspond.
    """
    if by not in BY:
        raise TersorError(f"by {by!r} is not one of {', '.join(BY)}")
    started = time.monotonic()
    measure = exchange.measure
    parts = exchange.parts()
    if not parts:
        raise TersorError(f"{names[1]} has no linear layers that could be compared")
    asked = {"version": __version__, "models": fingerprint, "samples": measure.key, "by": by}
    asked["parts"] = hash_of_json([part.members for part in parts])
    search = _Search(exchange, open_state(state, hash_of_json(asked)), progress or silent)
    search.deadline = None if seconds is None else started + seconds
    rows, blocks, left = search.run(parts, by)
    total = search.total()
    return Attribution(
        model=names[0],
        base=names[1],
        text=measure.text,
        by=by,
        rows=_by_cost(rows),
        total_kl=float(total.mean()),
        suggestion=None,
        total_half_width=half_width(total),
        measure=measure.name,
        samples=len(total),
        blocks=_by_cost(blocks),
        left=tuple(left),
    )


def _by_cost(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: -row.cost))


@dataclass
class _Search:
    exchange: Exchange
    state: State
    progress: Progress
    deadline: float | None = None
    slowest: float = 0.0  # seconds of one measurement
    fresh: int = 0  # measurements of this call
    shown: tuple[int, int] = (0, 0)

    def run(self, parts: Sequence[Part], by: str) -> tuple[list[Row], list[Row], list[str]]:
        """The rows that were asked for, the rows of the blocks on the way, and the names of what was not measured."""
        self.total()
        groups = _groups(parts)
        queue: list[tuple[float, int, Group]] = []
        differing = [group for group in groups if group.members]
        roots = differing if self._is_flat(differing) else _halves(differing)
        blocks: dict[str, Row] = {}
        found: dict[str, Row] = {part.name: _row(part, None, None, None) for part in parts if not part.changed}
        self.shown = (0, len(differing) + (by == "layer") * sum(part.changed for part in parts))

        def take(chosen: Sequence[Group]) -> bool:
            """Measure groups and queue them; False where the time does not suffice for all."""
            done = self._measure(chosen)
            for group in chosen:
                if group.key not in self.state.measured:
                    continue
                row = self._row_of(group, whole=group.parts[0].block is not None)
                if len(group.blocks) <= 1:
                    blocks[group.parts[0].block or group.parts[0].name] = row
                heapq.heappush(queue, (-row.cost, len(taken), group))
                taken.append(group)
            return done

        taken: list[Group] = []
        going = take(roots)
        while going and queue:
            _, _, group = heapq.heappop(queue)
            if len(group.blocks) > 1:
                going = take(_halves([Group(each, (each,)) for each in group.blocks]))
            elif by == "layer":
                layers = [Group((part,)) for part in group.parts if part.changed]
                going = self._measure(layers)
                known = [each for each in layers if each.key in self.state.measured]
                found |= {each.parts[0].name: self._row_of(each, whole=False) for each in known}
        if by == "block":
            whole = {group.parts[0].block or group.parts[0].name: group for group in groups}
            rows = [
                blocks.get(name) or _row(_whole(group), None, None, None)
                for name, group in whole.items()
                if name in blocks or not group.members
            ]
            return rows, [], [name for name, group in whole.items() if name not in blocks and group.members]
        return list(found.values()), list(blocks.values()), [part.name for part in parts if part.name not in found]

    def total(self) -> Tensor:
        """The compressed model's own distances."""
        if "total" not in self.state.measured:
            began = time.monotonic()
            self.state.measured["total"] = {"total": self.exchange.total().tolist()}
            self.slowest = time.monotonic() - began
            self.state.save()
        return torch.tensor(self.state.measured["total"]["total"], dtype=torch.float64)

    def _is_flat(self, groups: Sequence[Group]) -> bool:
        if self.state.flat is None:
            rest = None if self.deadline is None else self.deadline - time.monotonic()
            needed = 2 * self.slowest * len(groups)
            self.state.flat = rest is None or needed <= SHARE * rest
        return self.state.flat

    def _measure(self, groups: Sequence[Group]) -> bool:
        """Measure what is not known; False where the time does not suffice for all of it."""
        known = self.state.measured
        todo = [group for group in groups if group.key not in known]
        for _ in range(len(groups) - len(todo)):
            self._show()
        while todo and (most := self._affordable()):
            now, todo = todo[:most], todo[most:]
            began = time.monotonic()
            for group, (alone, rest) in zip(now, self.exchange.exchanged([each.members for each in now]), strict=True):
                known[group.key] = {"alone": alone.tolist(), "rest": rest.tolist()}
            self.state.save()
            self.slowest = max(self.slowest, (time.monotonic() - began) / (2 * len(now)))
            self.fresh += len(now)
            for _ in now:
                self._show()
        return not todo

    def _affordable(self) -> int:
        """Groups that the time suffices for, at most as many as are measured at once; one at least in every call."""
        if self.deadline is None:
            return self.exchange.at_once
        if self.slowest == 0:  # nothing was measured in this call yet
            return 1
        left = int((self.deadline - time.monotonic()) / max(2 * self.slowest, 1e-9))
        return min(self.exchange.at_once, max(left, 0 if self.fresh else 1))

    def _show(self) -> None:
        self.shown = (self.shown[0] + 1, self.shown[1])
        self.progress("exchanging", min(self.shown), self.shown[1])

    def _row_of(self, group: Group, *, whole: bool) -> Row:
        known = self.state.measured[group.key]
        alone, rest = (torch.tensor(known[name], dtype=torch.float64) for name in ("alone", "rest"))
        part = _whole(group) if whole else group.parts[0]
        return _row(part, alone, self.total() - rest, group.members)


def _row(part: Part, alone: Tensor | None, restored: Tensor | None, members: Sequence[str] | None) -> Row:
    """Without measurements: of a part that is the same in both."""
    return Row(
        name=part.name,
        kind=part.kind,
        depth=part.depth,
        bits=part.bits,
        kl=0.0 if alone is None else float(alone.mean()),
        half_width=0.0 if alone is None else half_width(alone),
        restored=0.0 if restored is None else float(restored.mean()),
        restored_half_width=0.0 if restored is None else half_width(restored),
        members=part.members if members is None else tuple(members),
    )


def _whole(group: Group) -> Part:
    """A block as one part; its bits are given where all its packed layers have the same."""
    first = group.parts[0]
    bits = {part.bits for part in group.parts if part.bits is not None}
    name = first.block or first.name
    members = tuple(name for part in group.parts for name in part.members)
    return Part(name, "block", first.depth, first.block, members, bits.pop() if len(bits) == 1 else None, True)


def _groups(parts: Sequence[Part]) -> list[Group]:
    """One of each block, and one of each part outside."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.block or part.name, []).append(part)
    return [Group(tuple(each), (tuple(each),)) for each in found.values()]


def _halves(groups: Sequence[Group]) -> list[Group]:
    middle = (len(groups) + 1) // 2
    return [_joined(half) for half in (groups[:middle], groups[middle:]) if half]


def _joined(groups: Sequence[Group]) -> Group:
    blocks = tuple(block for group in groups for block in group.blocks)
    return Group(tuple(part for block in blocks for part in block), blocks)


def state_file(out: Path) -> Path:
    """Where the measurements for a result `out` wait until all are there."""
    return out.with_name(f".{out.name}.state")


def read_attribution(path: str | Path) -> Attribution:
    """A result of `--out`. Raises TersorError where the file holds none."""
    found: Mapping[str, Any] | None = read_object(Path(path))
    if found is None:
        raise TersorError(f"{path} holds no attribution: `tersor attribute ... --out FILE` writes one")
    return Attribution.from_json(found)
