"""Streams of events between nodes: a user's file, a generated stream with planted structure, and batches to predict.

    stream = read_events("events.csv")                 # columns src, dst, time; further columns are numbers of the event
    stream = planted_stream(nodes=200, events=20_000)  # edges that recur, edges in bursts, and chance
    parts = split_stream(stream)                       # 70 %, 15 % and 15 % of the time; a tenth of the nodes hidden
    batches = LinkBatches(parts.train, window=4096, node_dim=32)
    batches[0]        # {"edge_index", "time", "x", "edge_attr", "query", "target"}, as models.graph.todyformer takes them

The planted stream is between n / 2 sources (0, ...) and n / 2 destinations. Time is in units of the mean gap between
events. `stream.kind` says of each event

    0   periodic: a pair of nodes that meets every `period`, its own between half and three halves of the mean, from its
        own phase on, each time off by `jitter` periods (normal)
    1   bursty: a pair that is silent for long, and then meets `burst` times on average (geometric), `gap` apart (exponential)
    2   noise: any source and any destination

so whether two nodes have met before tells little about whether they meet now, but when they met does.

A batch is `batch` events in a row and as many false pairs. Of the past, a model sees the last `window` events that are
strictly earlier than the batch's first. False pairs have the true source and

    "random"      any destination of the stream
    "historical"  instead: a pair that has met before the batch, but does not meet in it (Poursafaei et al., 2022)

With node_dim, x are random vectors drawn for each batch anew: nodes can be told apart and cannot be learned by heart.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import read_bytes, readable

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
KINDS = ("periodic", "bursty", "noise")
NEGATIVES = ("random", "historical")


@dataclass(frozen=True)
class EventStream:
    """Events in order of time. Raises TersorError where they are not, or name nodes that are not there."""

    src: Ints  # [E]
    dst: Ints  # [E]
    time: Floats  # [E]
    num_nodes: int
    features: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # [E, e]; none: e = 0
    names: tuple[str, ...] = ()  # of the nodes, where a file has names
    kind: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))  # [E] of a planted stream

    def __post_init__(self) -> None:
        count = len(self.src)
        if not len(self.features):
            object.__setattr__(self, "features", np.zeros((count, self.features.shape[1]), np.float32))
        for name in ("dst", "time", "features"):
            if len(getattr(self, name)) != count:
                raise TersorError(f"a stream of {count} events has {len(getattr(self, name))} entries of {name}")
        for name in ("src", "dst"):
            ids = getattr(self, name)
            if count and not 0 <= ids.min() <= ids.max() < self.num_nodes:
                raise TersorError(f"{name} names nodes {ids.min()} to {ids.max()}, the stream has {self.num_nodes}")
        for name in ("time", "features"):
            if not np.isfinite(getattr(self, name)).all():
                row = int(np.flatnonzero(~np.isfinite(getattr(self, name).reshape(count, -1)).all(1))[0])
                raise TersorError(f"event {row}: {name} is not finite (NaN or Inf)")
        late = np.flatnonzero(np.diff(self.time) < 0)
        if len(late):
            row = int(late[0]) + 1
            raise TersorError(
                f"event {row} is at time {self.time[row]:g}, before event {row - 1} at {self.time[row - 1]:g}; "
                "sort the events by time"
            )

    def __len__(self) -> int:
        return len(self.src)

    def only(self, chosen: NDArray[np.bool_]) -> EventStream:
        """The chosen events [E] of the same nodes."""
        kind = self.kind[chosen] if len(self.kind) else self.kind
        return EventStream(
            self.src[chosen],
            self.dst[chosen],
            self.time[chosen],
            self.num_nodes,
            self.features[chosen],
            self.names,
            kind,
        )


def read_events(path: str | Path) -> EventStream:
    """A CSV file (.gz too): a header with src, dst and time, or without one these three in this order.

    Nodes are any words; they are numbered as they first appear. Raises TersorError where a row does not fit.
    """
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"no file of events at {path}")
    try:
        rows = [row for row in csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TersorError(f"{path} cannot be read as comma-separated text: {error}") from None
    names = ["src", "dst", "time"]
    first = 1
    if rows and len(rows[0]) > 2 and _number(rows[0][2]) is None:
        names, first = [cell.strip() for cell in rows.pop(0)], 2
        missing = [name for name in ("src", "dst", "time") if name not in names]
        if missing:
            raise TersorError(f"{path} has the columns {', '.join(names)}; {', '.join(missing)} is not among them")
    if not rows:
        raise TersorError(f"{path} holds no events")
    width = len(rows[0])
    if names == ["src", "dst", "time"]:
        names += [str(n) for n in range(width - 3)]
    if width != len(names) or width < 3:
        raise TersorError(f"{path}, row {first}: {width} columns, {len(names)} are expected: {', '.join(names)}")
    places = {name: names.index(name) for name in ("src", "dst", "time")}
    others = [n for n in range(width) if n not in places.values()]
    nodes: dict[str, int] = {}
    ends, numbers = np.empty((len(rows), 2), np.int64), np.empty((len(rows), 1 + len(others)))
    for n, row in enumerate(rows):
        if len(row) != width:
            raise TersorError(f"{path}, row {n + first}: {len(row)} columns, {width} in the first row")
        for side, name in enumerate(("src", "dst")):
            ends[n, side] = nodes.setdefault(row[places[name]].strip(), len(nodes))
        for column, place in enumerate((places["time"], *others)):
            value = _number(row[place])
            if value is None:
                raise TersorError(f"{path}, row {n + first}: {names[place]} is {row[place]!r}, not a number")
            numbers[n, column] = value
    try:
        return EventStream(
            ends[:, 0], ends[:, 1], numbers[:, 0], len(nodes), numbers[:, 1:].astype(np.float32), tuple(nodes)
        )
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None


def planted_stream(
    *,
    nodes: int = 200,
    events: int = 20_000,
    periodic: float = 0.45,
    bursty: float = 0.45,
    pairs: int = 100,
    jitter: float = 0.03,
    burst: float = 8.0,
    gap: float = 4.0,
    seed: int = 0,
) -> EventStream:
    """A stream as the module describes it. periodic, bursty: shares of the events, the rest is noise. pairs: how many of each
    kind."""
    half, rest = nodes // 2, 1 - periodic - bursty
    if half < 1 or events < 1 or pairs < 1 or min(periodic, bursty, rest) < -1e-9 or min(jitter, burst - 1, gap) < 0:
        raise TersorError(
            f"no stream has {nodes} nodes, {events} events, {pairs} pairs, shares {periodic:g} and {bursty:g}, "
            f"jitter {jitter:g}, bursts of {burst:g}, gap {gap:g}"
        )
    random = np.random.default_rng(seed)
    length = 1.2 * events  # cut to the right number at the end
    times: list[Floats] = []
    ends: list[Ints] = []
    kinds: list[int] = []

    def add(when: Floats, pair: Ints, kind: int) -> None:
        inside = (when >= 0) & (when < length)
        times.append(when[inside])
        ends.append(np.broadcast_to(pair, (len(when), 2))[inside])
        kinds.extend([kind] * int(inside.sum()))

    chosen = np.stack((random.integers(half, size=2 * pairs), half + random.integers(nodes - half, size=2 * pairs)), 1)
    for pair in chosen[:pairs] if periodic > 0 else ():
        period = pairs / periodic * random.uniform(0.5, 1.5)
        when = (random.uniform() + np.arange(int(length / period) + 1)) * period
        add(when + jitter * period * random.standard_normal(len(when)), pair, 0)
    for pair in chosen[pairs:] if bursty > 0 else ():
        starts = random.uniform(0, length, random.poisson(length * bursty / (pairs * burst)))
        for start in starts:
            add(start + np.cumsum(random.exponential(gap, random.geometric(1 / burst))), pair, 1)
    count = random.poisson(length * max(rest, 0.0))
    loose = np.stack((random.integers(half, size=count), half + random.integers(nodes - half, size=count)), 1)
    add(random.uniform(0, length, count), loose, 2)

    time, edges = np.concatenate(times), np.concatenate(ends)
    order = np.argsort(time, kind="stable")[:events]
    if len(order) < events:
        raise TersorError(f"{events} events are too few for {pairs} pairs of each kind: only {len(order)} came about")
    return EventStream(edges[order, 0], edges[order, 1], time[order], nodes, kind=np.array(kinds, np.int8)[order])


@dataclass(frozen=True)
class StreamParts:
    """Where the parts begin, and what training may see."""

    whole: EventStream
    train: EventStream  # without any event of a hidden node
    validation: tuple[int, int]  # events of `whole`, from and to
    test: tuple[int, int]
    hidden: NDArray[np.bool_]  # [nodes]

    def inductive(self) -> NDArray[np.bool_]:
        """[E]: the events of `whole` that have a hidden node."""
        return np.asarray(self.hidden[self.whole.src] | self.hidden[self.whole.dst])


def split_stream(
    stream: EventStream, *, train: float = 0.7, validation: float = 0.15, hidden: float = 0.1, seed: int = 0
) -> StreamParts:
    """Split in order of time. hidden: of the nodes that appear after the training part, the share that training never sees."""
    if not (0 < train < 1 and 0 <= validation < 1 - train and 0 <= hidden < 1):
        raise TersorError(f"a stream is not split into {train:g}, {validation:g} and the rest with {hidden:g} hidden")
    first, second = int(len(stream) * train), int(len(stream) * (train + validation))
    later = np.unique(np.concatenate((stream.src[first:], stream.dst[first:])))
    chosen = np.random.default_rng(seed).choice(later, int(len(later) * hidden), replace=False)
    mask = np.zeros(stream.num_nodes, bool)
    mask[chosen] = True
    seen = np.arange(len(stream)) < first
    kept = stream.only(seen & ~mask[stream.src] & ~mask[stream.dst])
    if not len(kept):
        raise TersorError(f"of {len(stream)} events none is left to train on")
    return StreamParts(stream, kept, (first, second), (second, len(stream)), mask)


@dataclass(frozen=True)
class Pairs:
    """The pairs of one batch, true ones first."""

    src: Ints  # [B]
    dst: Ints  # [B]
    target: NDArray[np.float32]  # [B]: 1 where they meet
    known: int  # so many events of the stream are before the batch


class LinkBatches(Dataset[dict[str, Tensor]]):
    """Item i: the i-th `batch` events from `begin` to `end`, false pairs, and the window before them.

    only [E]: the events that are asked for; the others are still seen in windows. Chance depends on seed, epoch and i.
    """

    def __init__(
        self,
        stream: EventStream,
        *,
        window: int,
        batch: int = 200,
        node_dim: int = 0,
        begin: int = 0,
        end: int | None = None,
        negatives: str = "random",
        only: NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> None:
        end = len(stream) if end is None else end
        if window < 1 or batch < 1 or not 0 <= begin <= end <= len(stream):
            raise TersorError(
                f"batches of {batch} events with a window of {window} are not made of events {begin} to {end} "
                f"of {len(stream)}"
            )
        if negatives not in NEGATIVES:
            raise TersorError(f"negatives are one of {', '.join(NEGATIVES)}, not {negatives!r}")
        self.stream, self.window, self.node_dim, self.negatives, self.seed = stream, window, node_dim, negatives, seed
        events = np.arange(begin, end)
        events = events if only is None else events[only[begin:end]]
        self.events = [events[at : at + batch] for at in range(0, len(events), batch)]
        self.destinations = np.unique(stream.dst)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Other false pairs and other x; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.events)

    def pairs(self, index: int) -> Pairs:
        stream, events = self.stream, self.events[index]
        random = np.random.default_rng(mixed_seed(self.seed, self.epoch, index))
        src, dst = stream.src[events], stream.dst[events]
        known = int(np.searchsorted(stream.time, stream.time[events[0]], "left"))
        other = random.choice(self.destinations, len(events))
        same = other == dst  # not the pair itself
        other[same] = self.destinations[(np.searchsorted(self.destinations, dst[same]) + 1) % len(self.destinations)]
        from_ = src
        if self.negatives == "historical":
            size = stream.num_nodes
            before = np.unique(stream.src[:known] * size + stream.dst[:known])
            before = np.setdiff1d(before, src * size + dst)
            if len(before):
                keys = random.choice(before, len(events), replace=len(before) < len(events))
                from_, other = keys // size, keys % size
        target = np.repeat(np.array([1, 0], np.float32), len(events))
        return Pairs(np.concatenate((src, from_)), np.concatenate((dst, other)), target, known)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pairs, stream = self.pairs(index), self.stream
        window = slice(max(0, pairs.known - self.window), pairs.known)
        ends = np.concatenate((stream.src[window], stream.dst[window], pairs.src, pairs.dst))
        nodes, place = np.unique(ends, return_inverse=True)  # numbered anew: only those of the batch
        count, asked = pairs.known - window.start, len(pairs.src)
        chance = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch, index, 1))
        item = {
            "edge_index": torch.from_numpy(place[: 2 * count].reshape(2, count)),
            "time": torch.from_numpy(stream.time[window]),
            "x": torch.randn(len(nodes), self.node_dim, generator=chance),
            "query": torch.from_numpy(place[2 * count :].reshape(2, asked)),
            "target": torch.from_numpy(pairs.target),
        }
        if stream.features.shape[1]:
            item["edge_attr"] = torch.from_numpy(stream.features[window])
        return item

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of the trainer is one item: its events have one window."""
        if len(items) != 1:
            raise TersorError(
                f"{len(items)} windows do not go into one step; --batch-size 1 (data.batch says how many events are predicted)"
            )
        return items[0]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
