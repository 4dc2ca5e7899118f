"""What a report says, as plain values: the page is drawn from it, it lies in the page as JSON, and `read` gives it back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.evaluate.divergence import Divergence
from tersor.evaluate.loaders import Loader
from tersor.evaluate.sizes import Sizes
from tersor.evaluate.weight_view import LayerView
from tersor.untrusted import JSON_BYTES, check_depth, read_bytes

KIND = "tersor report"
ELEMENT = "tersor-report"  # the id of the <script> that holds the JSON
_SCRIPT = re.compile(rf'<script type="application/json" id="{ELEMENT}">(.*?)</script>', re.S)


@dataclass(frozen=True)
class Layer:
    """A linear map. None where nobody measured it.

    depth: the number of its block, counted over the model; kind: its name within the block. error, damp, condition, tokens,
    seconds, note: as the job reported. relative_error: ‖W - Q‖ / ‖W‖. kl, restored: as `tersor attribute` measured, in nats.
    """

    name: str
    depth: int
    kind: str
    bits: float | None = None
    error: float | None = None
    damp: float | None = None
    condition: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    note: str = ""
    relative_error: float | None = None
    kl: float | None = None
    kl_half_width: float | None = None
    restored: float | None = None


@dataclass(frozen=True)
class Compared:
    """One text on which the model was compared with the original."""

    text: str
    found: Divergence


@dataclass(frozen=True)
class Continuation:
    """What both models write after a prompt when they always take the likeliest token."""

    prompt: str
    original: str
    compressed: str


@dataclass(frozen=True)
class Speed:
    """Measured on this machine. Tokens a second: median and the middle half. memory: the peak of a process that loads and runs
    the model, bytes. bandwidth: what a copy moves, bytes a second; share: of it, by reading the weights once a token. share and
    weight_bytes are None of a mixture of experts, which reads some of them."""

    engine: str
    decode: tuple[float, float, float]
    prefill: tuple[float, float, float]
    prompt_tokens: int
    new_tokens: int
    memory: int
    weight_bytes: int | None
    bandwidth: float
    share: float | None
    where: str


@dataclass(frozen=True)
class Result:
    """One model. record: its tersor.json; run: its tersor-run.json; both empty where a model has none."""

    name: str
    architecture: str
    record: dict[str, Any]
    run: dict[str, Any]
    sizes: Sizes
    layers: list[Layer]
    views: list[LayerView]
    loaders: list[Loader]
    compared: list[Compared] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    attributed: dict[str, Any] | None = None  # total_kl and what it was measured on
    speed: Speed | None = None


@dataclass(frozen=True)
class Report:
    """base: the original, where it was given. notes: what is not there, and why."""

    results: list[Result]
    base: Result | None
    machine: dict[str, Any]
    made: str
    version: str
    notes: list[str] = field(default_factory=list)

    def label(self, result: Result) -> str:
        """What the page calls a result or the original."""
        every = [*self.results, *([self.base] if self.base is not None else [])]
        return shortened([each.name for each in every])[result.name]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = plain({"kind": KIND, **dataclasses.asdict(self)})
        return found


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Of each path its last parts, as many as tell it from the others."""
    parts = {name: (name.rstrip("/") or name).split("/") for name in names}

    def end(name: str, n: int) -> str:
        return "/".join(parts[name][-n:])

    found = {}
    for name in parts:
        others = [each for each in parts if parts[each] != parts[name]]
        n = 1
        while any(end(each, n) == end(name, n) for each in others):
            n += 1
        found[name] = end(name, n)
    return found


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def embedded(value: Any) -> str:
    """JSON that is safe inside a <script> element, whatever names and texts are in it."""
    text = json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def read(path: str | Path) -> dict[str, Any]:
    """What a report says, from the page or from a file with what `--json` printed. Raises TersorError where it is neither."""
    path = Path(path).expanduser()
    try:
        text = read_bytes(path, most=JSON_BYTES).decode("utf-8")
        inside = _SCRIPT.search(text)
        found = json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        raise TersorError(f"{path} is no report: neither a page of `tersor report` nor its JSON") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise TersorError(f"{path} is no report: neither a page of `tersor report` nor its JSON")
    check_depth(path, found)
    return found
