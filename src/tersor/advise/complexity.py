"""What attention and the layers that take its place cost at a length n and a width d: formulae, and the clock.

Operations are floating-point operations of matrix products and convolutions (a multiplication and an addition are two), which
torch's counter counts too, but for `unseen`. FFTs, scans and exponentials are named in `besides`. Numbers held: what
lies between the layer's input and its output at once, without weights. Cache: numbers that generation keeps of the past;
None where the layer is not causal. A formula in words alone is the survey's (arXiv 2103.14636, table 2) of layers that are
not held here.

    n tokens, d width, h heads, w window, k keys, N states a channel
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tersor import models
from tersor.errors import TersorError
from tersor.evaluate.machine import memory_available

STATES, FEATURES = 16, int(64 * math.log(64))  # of Mamba; of Performer's heads of 64
S4D_STATES = 64
WIDTH = 4  # bytes of a float32
PART = 0.5  # of the free memory, for what a layer holds: weights and copies take more
LIMIT = 10.0  # seconds of one pass, above which a length is not timed
PROBE = 1024  # tokens, from which the time of a longer first length is extrapolated


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer and its input."""

    n: int  # tokens
    d: int  # width
    heads: int = 8
    window: int = 128  # tokens of a block; each token sees its own block and the two beside it
    k: int = 256  # keys of Linformer

    def __post_init__(self) -> None:
        for name in ("n", "d", "heads", "window", "k"):
            if getattr(self, name) < 1:
                raise TersorError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d % self.heads:
            raise TersorError(f"d {self.d} is no multiple of {self.heads} heads; give another --heads")

    @property
    def padded(self) -> int:
        return -(-self.n // self.window) * self.window


Count = Callable[[Shape], int]


@dataclass(frozen=True)
class Kind:
    """A layer that tersor has."""

    name: str
    order: str  # of the operations in n, as written in papers
    exponent: float  # of n in `order`
    operations: Count
    held: Count  # numbers between input and output at once
    cache: Count | None  # numbers kept of the past; None where the layer is not causal
    build: Callable[[Shape], Callable[[Tensor], Tensor]]  # a layer x (B, n, d) -> (B, n, d)
    node: str  # in the surveys' catalogue
    besides: str = ""  # costs that `operations` leaves out
    attention: bool = False  # whether it is attention itself
    unseen: Count = lambda s: 0  # operations of these that torch's counter does not see, as an op of ours computes them


@dataclass(frozen=True)
class Formula:
    """A layer that is not held: what the survey says."""

    name: str
    time: str
    memory: str
    note: str = ""


def _part(model: nn.Module, kind: str) -> Any:
    """The first module of a class inside a registered model."""
    return next(each for each in model.modules() if type(each).__name__ == kind).eval()


def _spt(shape: Shape, *, local: bool) -> Callable[[Tensor], Tensor]:
    block = shape.window if local else 0
    model = models.create("spt", d_model=shape.d, heads=shape.heads, n_layers=1, local_block=block, pos=False)
    found: Callable[[Tensor], Tensor] = _part(model, "Attention")
    return found


def _linformer(shape: Shape) -> Callable[[Tensor], Tensor]:
    model = models.create("linformer", dim=shape.d, seq_len=shape.n, depth=1, k=shape.k, heads=shape.heads)
    found: Callable[[Tensor], Tensor] = _part(model, "Attention")
    return found


def _performer(shape: Shape) -> Callable[[Tensor], Tensor]:
    plain: dict[str, Any] = {"node_encoder": "LinearNode", "edge_encoder": "LinearEdge", "layers": 1}
    model = models.create("graphgps", **plain, layer_type="GINE+Performer", dim_hidden=shape.d, n_heads=shape.heads)
    layer = _part(model, "Performer")
    return lambda x: layer(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None)


def _informer(shape: Shape) -> Callable[[Tensor], Tensor]:
    model = models.create("informer", d_model=shape.d, n_heads=shape.heads, e_layers=1, seq_len=shape.n)
    found = _part(model, "Attention")
    return lambda x: found(x, x)


def _autoformer(shape: Shape) -> Callable[[Tensor], Tensor]:
    model = models.create("autoformer", d_model=shape.d, n_heads=shape.heads, e_layers=1, d_layers=1)
    found = _part(model, "AutoCorrelation")
    return lambda x: found(x, x)[0]


def _hopfield(shape: Shape) -> Callable[[Tensor], Tensor]:
    model = models.create("hopfield", input_size=shape.d, num_heads=shape.heads).eval()
    return lambda x: model(x, x)


def _s4d(shape: Shape) -> Callable[[Tensor], Tensor]:
    layer = _part(models.create("s4d", d_model=shape.d, n_layers=1, d_state=S4D_STATES), "S4D")
    return lambda x: layer(x.transpose(1, 2)).transpose(1, 2)


def _mamba(shape: Shape) -> Callable[[Tensor], Tensor]:
    layer = _part(models.create("mamba", d_model=shape.d, n_layer=1, vocab_size=8), "Mamba1Mixer")
    return lambda x: layer(x)[0]


def _lstm(shape: Shape) -> Callable[[Tensor], Tensor]:
    model = models.create("flashrnn", d_model=shape.d, num_heads=shape.heads, n_layer=1, function="lstm", vocab_size=8)
    layer = _part(model, "RNN")
    return lambda x: layer(x)[0]


def _kept(s: Shape) -> int:
    return min(5 * math.ceil(math.log(max(s.n, 2))), s.n)


def _side(s: Shape) -> int:
    return math.isqrt(max(s.n - 1, 0)) + 1


def _rank(s: Shape) -> int:
    return -(-s.d // 16)


KINDS = (
    Kind(
        "attention",
        "n² d",
        2,
        lambda s: 8 * s.n * s.d**2 + 4 * s.n**2 * s.d,
        lambda s: 4 * s.n * s.d,
        lambda s: 2 * s.n * s.d,
        lambda s: _spt(s, local=False),
        "practical/kernel",
        "softmax; the n² h scores are never held at once",
        attention=True,
    ),
    Kind(
        "local-window",
        "n w d",
        1,
        lambda s: 8 * s.n * s.d**2 + (4 * s.n**2 * s.d if s.n <= s.window else 12 * s.padded * s.window * s.d),
        lambda s: 2 * s.n * s.d + 7 * s.padded * s.d,
        None,
        lambda s: _spt(s, local=True),
        "practical/sparse-fixed",
        "softmax",
        attention=True,
    ),
    Kind(
        "linformer",
        "n k d",
        1,
        lambda s: 8 * s.n * s.d**2 + 8 * s.n * s.k * s.d,
        lambda s: 4 * s.n * s.d + 2 * s.k * s.d,
        None,
        _linformer,
        "practical/factorised",
        "softmax; fixed n, not causal",
        attention=True,
    ),
    Kind(
        "performer",
        "n m d",
        1,
        lambda s: s.n * s.heads * 64 * (8 * s.d + 8 * FEATURES) + 2 * s.n * s.heads * FEATURES,
        lambda s: 4 * s.n * 64 * s.heads + 2 * s.n * s.heads * FEATURES,
        lambda s: s.heads * FEATURES * 65,
        _performer,
        "practical/kernel",
        "exponentials of n h m features; heads of 64",
        attention=True,
    ),
    Kind(
        "probsparse",
        "n log n d",
        1.1,
        lambda s: 8 * s.n * s.d**2 + 6 * s.n * _kept(s) * s.d,
        lambda s: 4 * s.n * s.d + s.n * _kept(s) * s.d,
        None,
        _informer,
        "practical/sparse-learned",
        "softmax of the queries that matter; sampled keys are gathered",
        attention=True,
    ),
    Kind(
        "autocorrelation",
        "n log n d",
        1.1,
        lambda s: 8 * s.n * s.d**2,
        lambda s: 8 * s.n * s.d,
        None,
        _autoformer,
        "inference/lightweight-attention",
        "FFTs of length n",
    ),
    Kind(
        "hopfield",
        "n² d",
        2,
        lambda s: 8 * s.n * s.d**2 + 4 * s.n**2 * s.d,
        lambda s: 4 * s.n * s.d + 2 * s.heads * s.n**2,
        None,
        _hopfield,
        "after/energy",
        "softmax; scores are held",
        attention=True,
    ),
    Kind(
        "s4d",
        "n log n d",
        1.1,
        lambda s: 4 * s.n * s.d**2 + 2 * s.d * (S4D_STATES // 2) * _side(s) ** 2,
        lambda s: 8 * s.n * s.d,
        lambda s: s.d * S4D_STATES,
        _s4d,
        "after/state-space",
        "long convolution by FFTs of length 2 n",
    ),
    Kind(
        "mamba",
        "n d N",
        1,
        lambda s: 4 * s.n * s.d * (2 * s.d + _rank(s) + _rank(s) + 2 * STATES + s.d) + 16 * s.n * s.d,
        lambda s: 10 * s.n * s.d,
        lambda s: 2 * s.d * (STATES + 3),
        _mamba,
        "after/state-space",
        "the scan over n d N states",
    ),
    Kind(
        "lstm",
        "n d²",
        1,
        lambda s: 8 * s.n * s.d**2 + 8 * s.n * s.d**2 // s.heads,
        lambda s: 6 * s.n * s.d,
        lambda s: 2 * s.d,
        _lstm,
        "after/recurrence",
        "n steps, one after another; heads recur apart",
        unseen=lambda s: 8 * s.n * s.d**2 // s.heads,
    ),
)

FORMULAE = (
    Formula("Sparse Transformer", "n sqrt(n)", "n sqrt(n)", "fixed patterns"),
    Formula("Longformer, BigBird, ETC", "n (w + g)", "n (w + g)", "local and global, BigBird random too"),
    Formula("Star-Transformer", "n", "n", "a hub node"),
    Formula("Reformer", "n log n", "n log n", "hashing, queries are keys"),
    Formula("Routing Transformer", "n sqrt(n)", "n sqrt(n)", "k-means"),
    Formula("Sinkhorn", "b² for each of n / b blocks", "the same", "learned sorting of blocks of b"),
    Formula("Linear Transformer", "n d²", "n", "kernel"),
)


def kind_named(name: str) -> Kind:
    known = {kind.name: kind for kind in KINDS}
    if name not in known:
        raise TersorError(f"no layer is called {name!r}; there are {', '.join(known)}")
    return known[name]


@torch.no_grad()
def counted(kind: Kind, shape: Shape) -> int:
    """Operations as torch's counter counts them: with gradients, which take torch's own operations instead of compiled ones."""
    layer, x = kind.build(shape), torch.randn(1, shape.n, shape.d, requires_grad=True)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(x)
    return int(counter.get_total_flops())


@torch.no_grad()
def measured(kind: Kind, shape: Shape, *, turns: int = 5, most: float = 2.0, least: bool = False) -> float:
    """Seconds of one forward pass of one sequence on this machine's CPU: the median of the turns, or the least. There are
    fewer turns where they take more than `most` seconds in all. A first pass does not count."""
    layer, x = kind.build(shape), torch.randn(1, shape.n, shape.d)
    layer(x)
    seconds: list[float] = []
    while len(seconds) < turns and sum(seconds) < most:
        began = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - began)
    return min(seconds) if least else statistics.median(seconds)


def room() -> float:
    """Bytes that a timed layer may hold; infinite where the system does not say what is free."""
    free = memory_available()
    return math.inf if free is None else PART * free


def timed(
    kind: Kind, shapes: Sequence[Shape], *, limit: float = LIMIT, most_bytes: float | None = None
) -> list[float | None]:
    """`measured` of every shape, which differ in n alone and rise; None where a layer would hold more than `most_bytes`
    (`room()` where not given), or a pass would take more than `limit` seconds, extrapolated from the shorter ones."""
    most = room() if most_bytes is None else most_bytes
    found: list[float | None] = []
    last: tuple[Shape, float] | None = None
    if shapes[0].n > PROBE and WIDTH * kind.held(replace(shapes[0], n=PROBE)) <= most:
        probe = replace(shapes[0], n=PROBE)
        last = probe, measured(kind, probe, turns=1)
    for shape in shapes:
        if WIDTH * kind.held(shape) > most or (last is not None and _expected(kind, shape, *last) > limit):
            found.append(None)
            continue
        last = shape, measured(kind, shape)
        found.append(last[1])
    return found


def _expected(kind: Kind, shape: Shape, before: Shape, seconds: float) -> float:
    """Seconds of a pass that grow as the operations, and at least as n."""
    return seconds * max(kind.operations(shape) / kind.operations(before), shape.n / before.n)


def slope(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Of log seconds over log n, by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(each) for each in seconds]
    return statistics.linear_regression(x, y).slope


def crossover(lengths: Sequence[int], base: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """The length from which `other` is and stays faster: where the log-log lines between two lengths meet; the first length if
    `other` is always faster; None if it is slower at the longest. Lengths at which only one was timed do not count."""
    both = [(n, b, a) for n, b, a in zip(lengths, base, other, strict=True) if b is not None and a is not None]
    if not both:
        return None
    return _crossover(*zip(*both, strict=True))


def _crossover(lengths: Sequence[int], base: Sequence[float], other: Sequence[float]) -> float | None:
    faster = [b < a for a, b in zip(base, other, strict=True)]
    if not faster[-1]:
        return None
    start = len(faster) - next((n for n, each in enumerate(reversed(faster)) if not each), len(faster))
    if start == 0:
        return float(lengths[0])
    before, after = (math.log(other[n] / base[n]) for n in (start - 1, start))
    share = before / (before - after)
    return float(lengths[start - 1] * (lengths[start] / lengths[start - 1]) ** share)


def parse_lengths(text: str) -> list[int]:
    """ "1k..64k" as powers of two between; "512,2k" in order, each once; "4096"."""

    def number(part: str) -> int:
        part = part.strip().lower()
        scale = {"k": 1024, "m": 1024**2}.get(part[-1:], 1)
        digits = part[:-1] if scale > 1 else part
        if not digits.isdigit() or not 1 <= int(digits) * scale <= 1 << 24:
            raise TersorError(f"--n {text!r} is not understood; write it as 1k..64k, 512,2k or 4096")
        return int(digits) * scale

    if ".." not in text:
        return sorted({number(part) for part in text.split(",")})
    first, last = (number(part) for part in text.split("..", 1))
    if first > last:
        raise TersorError(f"--n {text!r} begins above its end")
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found
