"""`tersor advise`: which recipe for this model, on this machine, within this budget.

    advice = advise("demo", Budget(loss=0.05), seconds=600)
    advice.chosen, advice.plans, advice.left

1. Every method says which recipes it offers for a model of this kind. Formulae give their bytes on disk. A recipe that is above
   a hard limit, or does not fit the model's layers, is dropped.
2. The original is measured: speed, memory, and its results on the user's data.
3. The others are predicted from formulae and the nearest evidence. The recipe that could still be the best is measured, and
   predictions are made again, until none could be better than the best measured one, or the time is over.
4. Plans that keep every limit are returned: the measured ones first, by size times latency where the loss is limited, else by
   loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tersor.advise.budget import Budget, binding
from tersor.advise.candidates import Candidate, candidates_for
from tersor.advise.evidence import (
    DEFAULT,
    Evidence,
    data_mark,
    keep_evidence,
    machine_mark,
    model_mark,
    read_evidence,
)
from tersor.advise.measure import Measured, measure
from tersor.advise.plans import Figure, Plan, Recipe, frontier, objective, ordered
from tersor.advise.predict import (
    MEMORY,
    SPEED_FAR,
    SPEED_NEAR,
    Layers,
    bandwidth,
    fitted,
    latency_formula,
    predicted_loss,
)
from tersor.advise.size import (
    bytes_in_memory,
    least_in_memory,
    least_on_disk,
    packed_maps,
    size_on_disk,
    skeleton,
)
from tersor.advise.workloads import KINDS, PROMPT, Workload, kind_of, loss_between
from tersor.apart import NoTimeError
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Checkpoint, open_checkpoint, torch_dtype
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.evaluate.machine import Machine, examine, memory_available
from tersor.layers.linear_map import linear_maps, matrix_shape
from tersor.progress import Progress, silent
from tersor.version import __version__

ROOM = 1.3  # of the original's weights, that must be free in memory to measure it


@dataclass(frozen=True)
class Advice:
    """What the advisor found."""

    model: str
    kind: str
    machine: str
    budget: Budget
    original: Plan
    plans: tuple[Plan, ...]  # those that keep the budget, in order
    front: tuple[str, ...]  # the names of the plans that no other dominates
    left: dict[str, str]  # recipes that are out, with the reason
    settings: dict[str, Any]  # of the compression
    binding: str = ""  # the limit that leaves no plan; empty where there is one
    notes: tuple[str, ...] = field(default=())  # what the machine's probe found, and what was skipped or cut short

    @property
    def chosen(self) -> Plan | None:
        return self.plans[0] if self.plans else None


def advise(
    model: str | Path,
    budget: Budget,
    *,
    files: Sequence[str | Path] = (),
    kind: str | None = None,
    calibration: bool = True,
    training: float = 0.0,
    calibrate_on: str | None = None,
    samples: int = 32,
    seq_len: int = 512,
    max_eval_samples: int | None = None,
    turns: int = 7,
    most: int = 6,
    seconds: float = 600.0,
    device: str = "auto",
    evidence: str | Path = DEFAULT,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Advice:
    """The plans for a model within a budget, the best first.

    kind: what the model is for. files: the user's texts, labelled pictures (a folder or .npz) or table, as the kind asks.
    calibration, training: whether methods may look at samples, and for how many seconds one may train. calibrate_on: text
    or pictures for it. samples, seq_len: of the calibration. max_eval_samples: windows (24) or pictures (200) to evaluate
    on. most: how many recipes are measured at most. seconds: for everything. only: names of recipes, where not all are wanted.
    evidence: the file of what was measured.

    Raises TersorError where the advisor does not know the model's kind, or its data are missing or do not fit.
    """
    tell = progress or silent
    deadline = time.monotonic() + seconds
    if training > seconds:
        raise TersorError(
            f"--training of {training:g} s is longer than the whole --time-limit of {seconds:g} s: give --time-limit more"
        )
    checkpoint = open_checkpoint(model)
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{model} is quantized already; give the original")
    found = kind_of(checkpoint, str(model))
    if kind is not None and kind != found:
        raise TersorError(f"{KINDS[kind]} is not for {model}, whose inputs are of the kind {found}: use {KINDS[found]}")
    if found != "text" and not files:
        raise TersorError(f"{model} is evaluated on data of yours: give {KINDS[found]}")
    for each in files:
        if not Path(each).expanduser().exists():
            raise TersorError(f"no file or folder at {each}")
    lazy = skeleton(checkpoint)
    place = pick_device(device)
    _check_room(lazy, place)
    paths = [Path(each).expanduser() for each in files]
    work = Workload(
        found, tuple(map(str, paths)), max_eval_samples or (200 if found == "image" else 24), 256, turns, device
    )
    settings = _settings(found, lazy, calibrate_on, samples, seq_len, paths, device)
    session = _Session(
        str(model), checkpoint, lazy, work, settings, budget, Path(evidence), machine_mark(place), tell, deadline
    )
    return session.advise(candidates_for(found, calibration=calibration, training=training > 0), most, training, only)


def _settings(
    kind: str, lazy: LazyModel, calibrate_on: str | None, samples: int, seq_len: int, files: Sequence[Path], device: str
) -> dict[str, Any]:
    """The arguments of `compress`, and the flags of the command."""
    if kind == "series":
        return {} if device == "auto" else {"device": device}
    found: dict[str, Any] = {"samples": samples}
    if kind == "text":
        found["seq_len"] = min(seq_len, positions_of(lazy.module) or seq_len)
        if calibrate_on is not None:
            found["calibration"] = calibrate_on
    else:
        found["calibration"] = calibrate_on or str(files[0])
    return found if device == "auto" else {**found, "device": device}


def _marked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as evidence keeps them: calibration files stand by their contents."""
    path = Path(settings.get("calibration", "")).expanduser()
    if "calibration" not in settings or not path.exists():
        return dict(settings)
    return {**settings, "calibration": data_mark([], [path])}


def _check_room(lazy: LazyModel, place: torch.device) -> None:
    """Raise TersorError where the original does not fit in memory: nothing could be compared with it."""
    needed = ROOM * bytes_in_memory(lazy, {}, lazy.dtype.itemsize)
    if place.type == "cuda":
        free: float = torch.cuda.mem_get_info(place)[0]
    else:
        free = memory_available() or needed
    if needed > free:
        raise TersorError(
            f"the original needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: advice measures the original "
            "first; use a larger machine, or --device"
        )


@dataclass
class _Session:
    """One run of the advisor: what is known, and what becomes known."""

    model: str
    checkpoint: Checkpoint
    lazy: LazyModel
    work: Workload
    settings: dict[str, Any]
    budget: Budget
    file: Path
    machine: str
    tell: Progress
    deadline: float
    rows: list[Evidence] = field(default_factory=list)
    probe: Machine | None = None
    notes: list[str] = field(default_factory=list)

    def advise(self, candidates: Sequence[Candidate], most: int, training: float, only: Sequence[str] | None) -> Advice:
        left: dict[str, str] = {}
        if only is not None:
            known = {each.name: each for each in candidates}
            for name in only:
                if name not in known:
                    raise TersorError(f"no recipe is called {name!r}; there are {', '.join(known)}")
            candidates = [known[name] for name in only]
        self.mark = model_mark(self.checkpoint)
        self.data = data_mark(
            [self.work.kind, self.work.units, self.work.length], [Path(each) for each in self.work.files]
        )
        rows = [row for row in read_evidence(self.file) if row.kind == self.work.kind]
        self.rows = [row for row in rows if row.current]
        if len(self.rows) < len(rows):
            self.notes.append(
                f"{self.file}: {len(rows) - len(self.rows)} runs are skipped, of methods or options that this version has not"
            )
        sizes = self._sizes(candidates, left)
        whole = Plan("original", (), disk=_exact(self.checkpoint.size()))
        if why := self._impossible(whole, [each for each in candidates if each.name in sizes], sizes):
            return self._advice(whole, [], left, why=why)
        base = self._base(whole)
        todo = {each.name: each for each in candidates if each.name in sizes}
        tried = 0
        while True:
            plans = [base, *(self._plan(each, sizes[name], base) for name, each in todo.items())]
            chosen = self._next(plans)
            if chosen is None or tried >= most:
                break
            candidate, tried = todo[chosen.name], tried + 1
            self.tell(f"measuring {chosen.name}", tried, most)
            try:
                self._measure(candidate, training)
            except NoTimeError as told:
                if time.monotonic() >= self.deadline:
                    self.notes.append(f"time was over while {chosen.name} was measured: give --time-limit more")
                    break
                left[chosen.name] = str(told)
                todo.pop(chosen.name)
            except TersorError as told:
                left[chosen.name] = str(told)
                todo.pop(chosen.name)
        return self._advice(base, plans, left)

    def _impossible(self, whole: Plan, candidates: Sequence[Candidate], sizes: Mapping[str, int | None]) -> str:
        """Why formulae alone say that no recipe keeps the budget; empty where one may."""
        asked = Budget(disk=self.budget.disk, memory=self.budget.memory)
        floor = least_on_disk(self.checkpoint, self.lazy)
        weights = "no less than its weights"
        plans = [replace(whole, memory=_least(least_in_memory(self.lazy, {}), weights))]
        for each in candidates:
            size = sizes[each.name]
            disk = (
                _least(floor, "no less than what is outside of the blocks")
                if size is None
                else _exact(size, measured=False)
            )
            held = least_in_memory(self.lazy, packed_maps(self.lazy, each.steps)) if size is not None else floor
            plans.append(Plan(each.name, each.recipe, disk=disk, memory=_least(held, weights)))
        return "" if any(asked.allows(plan) for plan in plans) else binding(asked, plans)

    def _sizes(self, candidates: Sequence[Candidate], left: dict[str, str]) -> dict[str, int | None]:
        sizes: dict[str, int | None] = {}
        for each in candidates:
            try:
                sizes[each.name] = size_on_disk(self.checkpoint, self.lazy, each.steps)
            except TersorError as told:
                left[each.name] = str(told)
        return sizes

    def _base(self, whole: Plan) -> Plan:
        row = self._known(())
        if row is None:
            self.tell("measuring the original", 0, 1)
            try:
                measured = measure(self.model, (), self.settings, self.work, deadline=self.deadline)
            except NoTimeError:
                raise TersorError(
                    "the time given is over before the original was measured; give a longer --time-limit"
                ) from None
            row = self._keep((), measured, loss=0.0)
        return replace(_measured(whole, row), loss=_exact(0.0), agreement=1.0 if row.answers else None)

    def _known(self, recipe: Recipe) -> Evidence | None:
        """What was measured here of this recipe, by this version, on these data."""

        def same(row: Evidence) -> bool:
            mine = (self.mark, self.data, self.machine, __version__)
            theirs = (row.model_mark, row.data_mark, row.machine, row.version)
            return theirs == mine and row.steps == recipe and (not recipe or row.settings == self.marked)

        return next((row for row in reversed(self.rows) if same(row)), None)

    def _measure(self, candidate: Candidate, training: float) -> None:
        deadline = self.deadline
        if candidate.needs == "training":
            deadline = min(deadline, time.monotonic() + training)
        try:
            measured = measure(self.model, candidate.recipe, self.settings, self.work, deadline=deadline)
        except NoTimeError:
            raise NoTimeError(
                "it took longer than the time for training" if deadline < self.deadline else "no time"
            ) from None
        base = self._known(())
        assert base is not None
        self._keep(candidate.recipe, measured, loss_between(self.work.kind, base.scores, measured.run.scores)[0])

    def _keep(self, recipe: Recipe, measured: Measured, loss: float) -> Evidence:
        row = Evidence(
            model=self.model,
            model_mark=self.mark,
            kind=self.work.kind,
            data_mark=self.data,
            recipe=[dict(step) for step in recipe],
            machine=self.machine,
            version=__version__,
            settings=self.marked,
            disk=measured.disk,
            memory=measured.run.memory,
            latency=measured.latency,
            latency_p95=measured.latency_p95,
            latency_quarters=measured.latency_quarters,
            scores=measured.run.scores,
            answers=measured.run.answers,
            seconds=measured.seconds,
            loss=loss,
        )
        keep_evidence(self.file, row)
        self.rows.append(row)
        return row

    def _plan(self, candidate: Candidate, size: int | None, base: Plan) -> Plan:
        row = self._known(candidate.recipe)
        if row is None:
            return self._predicted(candidate, size, base)
        original = self._known(())
        assert original is not None
        loss, half = loss_between(self.work.kind, original.scores, row.scores)
        plan = _measured(Plan(candidate.name, candidate.recipe), row)
        agreement = None
        if row.answers:
            agreement = sum(a == b for a, b in zip(row.answers, original.answers, strict=True)) / len(row.answers)
        return replace(
            plan,
            loss=Figure(loss, loss - half, loss + half, True, "on the same data", row.id),
            agreement=agreement,
            seconds=row.seconds,
        )

    def _predicted(self, candidate: Candidate, size: int | None, base: Plan) -> Plan:
        loss = predicted_loss(candidate.recipe, self.rows, model=self.mark, data=self.data, machine=self.machine)
        if size is None:
            return Plan(candidate.name, candidate.recipe, loss=loss, notes=("its size has no formula",))
        latency, memory = self._formulae(candidate)
        fits = [(row.steps, self._formulae(other), row) for other, row in self._measured_here()]
        latency, source = fitted(latency, candidate.recipe, [(steps, row.latency / f[0]) for steps, f, row in fits])
        memory, _ = fitted(memory, candidate.recipe, [(steps, row.memory / f[1]) for steps, f, row in fits])
        spread = SPEED_NEAR if source else SPEED_FAR
        source = f"formula, moved by {source}" if source else "formula"
        return Plan(
            candidate.name,
            candidate.recipe,
            disk=_exact(size, measured=False),
            memory=Figure(memory, memory / MEMORY, memory * MEMORY, False, source),
            latency=Figure(latency, latency / spread, latency * spread, False, source),
            loss=loss,
        )

    def _measured_here(self) -> list[tuple[Candidate, Evidence]]:
        """The candidates of this session that were measured."""
        return [(each, row) for each in self.formulated if (row := self._known(each.recipe)) is not None]

    def _formulae(self, candidate: Candidate) -> tuple[float, float]:
        """Latency and memory without calibration."""
        known = self._cache.get(candidate.name)
        if known is not None:
            return known
        base = self._known(())
        assert base is not None
        packed = packed_maps(self.lazy, candidate.steps)
        width = self.lazy.dtype.itemsize
        if packed and self.probe is None:
            self.tell("probing the machine", 0, 1)
            self.probe = examine()
        latency = base.latency
        if packed and self.probe is not None:
            rows = 1 if self.work.kind == "text" else PROMPT
            latency = latency_formula(
                base.latency, layers_of(self.lazy, packed, self.work.kind), packed, self.probe, rows=rows
            )
        memory = base.memory - bytes_in_memory(self.lazy, {}, width) + bytes_in_memory(self.lazy, packed, width)
        self._cache[candidate.name] = (latency, float(memory))
        self.formulated.append(candidate)
        return self._cache[candidate.name]

    def __post_init__(self) -> None:
        self._cache: dict[str, tuple[float, float]] = {}
        self.formulated: list[Candidate] = []
        self.mark = self.data = ""
        self.marked = _marked(self.settings)

    def _next(self, plans: Sequence[Plan]) -> Plan | None:
        """The plan that could still be better than the best measured one; the most hopeful of them."""
        bounded = self.budget.loss is not None
        fitting = [plan for plan in plans if plan.measured and self.budget.allows(plan)]
        best = min((objective(plan, bounded_loss=bounded) for plan in fitting), default=float("inf"))
        open_plans = [
            plan
            for plan in plans
            if not plan.measured
            and self.budget.allows(plan, hopeful=True)
            and objective(plan, bounded_loss=bounded, hopeful=True) < best
        ]

        if not any(plan.measured and plan.recipe for plan in plans) and all(plan.loss is None for plan in open_plans):
            by_size = sorted(open_plans, key=lambda plan: plan.disk.value if plan.disk is not None else float("inf"))
            sized = [plan for plan in by_size if plan.disk is not None] or by_size
            return sized[len(sized) // 2] if sized else None  # nothing is known of losses: begin in the middle

        def key(plan: Plan) -> tuple[bool, float, str]:
            return (not self.budget.expects(plan), objective(plan, bounded_loss=bounded), plan.name)

        return min(open_plans, key=key, default=None)

    def _advice(self, original: Plan, plans: Sequence[Plan], left: dict[str, str], *, why: str = "") -> Advice:
        kept = [plan for plan in plans if self.budget.allows(plan)]
        why = "" if kept else why or binding(self.budget, plans)
        return Advice(
            model=self.model,
            kind=self.work.kind,
            machine=self.machine,
            budget=self.budget,
            original=original,
            plans=tuple(ordered(kept, bounded_loss=self.budget.loss is not None)),
            front=tuple(plan.name for plan in frontier(kept)),
            left=left,
            settings=self.settings,
            binding=why,
            notes=(*self.notes, *(() if self.probe is None else (_told(self.probe),))),
        )


def layers_of(lazy: LazyModel, packed: Mapping[str, int], kind: str) -> Layers:
    """What the original reads of the layers that are packed. The engines read a text model's weights as they are stored."""
    width = torch_dtype(lazy.checkpoint.config).itemsize if kind == "text" else lazy.dtype.itemsize
    taken = sum(math.prod(matrix_shape(lazy.maps[name])) for name in packed)
    return Layers(taken, sum(math.prod(matrix_shape(each)) for each in linear_maps(lazy.module).values()), width)


def _told(probe: Machine) -> str:
    """What the probe measured, which predictions of speed are made of."""
    faster = ", ".join(f"{each.bits} bits {each.speedup[1]:.1f}" for each in probe.kernels)
    return (
        f"this machine reads {bandwidth(probe) / 1e9:.1f} GB/s of a {probe.dtype} layer with one row; packed layers are so many "
        f"times as fast: {faster}"
    )


def _exact(value: float, *, measured: bool = True) -> Figure:
    return Figure(value, value, value, measured, "" if measured else "formula, within 1 %")


def _least(value: float, source: str) -> Figure:
    """What a figure is at least."""
    return Figure(value, value, value, False, source)


def _measured(plan: Plan, row: Evidence) -> Plan:
    low, high = row.latency_quarters
    return replace(
        plan,
        disk=_exact(row.disk),
        memory=replace(_exact(row.memory), evidence=row.id),
        latency=Figure(row.latency, low, high, True, evidence=row.id),
    )
