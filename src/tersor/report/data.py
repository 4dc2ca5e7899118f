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
    """A linear map. A value that nobody measured is None."""

    name: str
    depth: int  # the number of its block, counted over the model
    kind: str  # its name within the block
    bits: float | None = None
    error: float | None = None  # this and the next five: as the job reported
    damp: float | None = None
    condition: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    note: str = ""
    relative_error: float | None = None  # ‖W - Q‖ / ‖W‖
    kl: float | None = None  # as `tersor attribute` measured, in nats
    kl_half_width: float | None = None
    restored: float | None = None  # likewise


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
    """What was measured on this machine. A mixture of experts, which reads some weights only, has no weight_bytes and no
    share.
    """

    engine: str
    decode: tuple[float, float, float]  # tokens a second: median and the middle half
    prefill: tuple[float, float, float]  # likewise
    prompt_tokens: int
    new_tokens: int
    memory: int  # bytes: the peak of a process that loads and runs the model
    weight_bytes: int | None  # that a token reads
    bandwidth: float  # bytes a second that a copy moves
    share: float | None  # of the bandwidth, by reading the weights once a token
    where: str


@dataclass(frozen=True)
class Result:
    """One model."""

    name: str
    architecture: str
    record: dict[str, Any]  # its tersor.json; empty where it has none
    run: dict[str, Any]  # its tersor-run.json; empty where it has none
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
    """What a page says."""

    results: list[Result]
    base: Result | None  # the original, where it was given
    machine: dict[str, Any]
    made: str
    version: str
    notes: list[str] = field(default_factory=list)  # what is missing, and why

    def label(self, result: Result) -> str:
        """What the page calls a result or the original."""
        every = [*self.results, *([self.base] if self.base is not None else [])]
        return shortened([each.name for each in every])[result.name]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = plain({"kind": KIND, **dataclasses.asdict(self)})
        return found


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Of each path its last parts: as many as make it unlike the others."""
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
