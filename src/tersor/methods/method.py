"""What a compression method is: a frozen dataclass whose fields are its options, with the code that applies it.

A method is one file in a folder beside this one (`weights`, `activations`, `structure`, `tokens`, `training`). Register it with
`@register`; the command line, the docs table and the recipe reader take its options from the dataclass fields, and nothing
else in the tree names it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.untrusted import check_number

if TYPE_CHECKING:
    from torch import nn

    from tersor.formats.layout import Layout, UniformGrids
    from tersor.methods.block import Block


@dataclass(frozen=True)
class Report:
    """How one part of a model was compressed: a row to show. A method derives a dataclass of its own, with a field per column."""

    name: str

    def row(self) -> dict[str, Any]:
        return {key: "" if value is None else value for key, value in dataclasses.asdict(self).items()}


@dataclass
class Work:
    """What a method gets beside the model."""

    # Calibration batches on the model's device. `target` holds labels, where the data have any; the model does not take it. A
    # method that needs no samples gets those that the user gave, maybe none.
    samples: Sequence[dict[str, Any]]
    wanted: Callable[[str], bool]  # whether the user asked for the layer of this name
    progress: Progress
    reports: list[Report] = field(default_factory=list)

    def report(self, report: Report) -> None:
        self.reports.append(report)


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class Method:
    """What all methods have. A method is a `BlockMethod`, a `ModelMethod` or a `PackedMethod`. `name`: on the command line."""

    name: ClassVar[str]
    survey_nodes: ClassVar[tuple[str, ...]] = ()  # its places in `tersor catalog`, such as "inference/quantization-ptq"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs_samples(self) -> bool:
        """Whether it looks at the model's activations or outputs."""
        return True

    @property
    def trains(self) -> bool:
        """Whether it takes training steps."""
        return False

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        """The recipes that `tersor advise` tries for models of a kind (text, image or series), each of one or several steps."""
        return ()

    def options(self) -> dict[str, Any]:
        """The options as plain values, `name` first; `from_options` makes the method again."""
        return {"name": self.name} | dataclasses.asdict(self)


@dataclass(frozen=True)
class BlockMethod(Method):
    """Works block by block, on models of any size."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """The formats on disk that can hold its result, the usual one first: "safetensors" for plain numbers."""
        raise NotImplementedError

    @property
    def compares(self) -> bool:
        """Whether it needs the inputs of the original model's layers too, not only those of the compressed model's."""
        return False

    @property
    def weighs_outputs(self) -> bool:
        """Whether it asks what errors of the layers' outputs cost, which takes a backward pass through the whole model."""
        return False

    def compress_block(self, block: Block) -> None:
        """Compress the linear maps of one block: call `block.replace(name, ...)` for each of `block.linears`."""
        raise NotImplementedError

    def quantization(self) -> UniformGrids | None:
        """The grids of its result; None where that is plain numbers."""
        return None

    def remark_on(self, tokens: int) -> str | None:
        """What to say before a job that calibrates on so many tokens of text; None where there is nothing to say."""
        return None

    def without_inputs(self) -> BlockMethod:
        """The method to use for an embedding, which has no inputs to calibrate with."""
        raise TersorError(f"method {self.name} does not compress embeddings; leave --embeddings out")

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        """Raise TersorError where the method cannot take this layer. Called for every layer before anything is done."""


@dataclass(frozen=True)
class ModelMethod(Method):
    """Works on the whole model in memory: changes its structure, or has to see everything at once."""

    keeps_size: ClassVar[bool] = False  # whether the result takes as many bytes on disk as the original
    takes_layers: ClassVar[bool] = True  # whether it asks `work.wanted`, so that the user can exclude layers

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        """The compressed model: `model` changed in place, or another one. Call `work.report(...)` for each part."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedMethod(Method):
    """Works on a packed model and its original, both in memory. It changes integers and steps; the file keeps its layout. In a
    recipe it is a step after one that packs."""

    @property
    def moves_integers(self) -> bool:
        """Whether integers change, also those of weights that are zero. Otherwise only steps change."""
        return False

    def tune(self, model: nn.Module, original: nn.Module, work: Work) -> None:
        """Change packed layers of `model` in place, by `QuantizedLinear.put`. Call `work.report(...)` for each part."""
        raise NotImplementedError


def register(method: M) -> M:
    _METHODS[method.name] = method
    return method


def method_names() -> list[str]:
    """The names of all methods, read from the source text: no method is imported, nor PyTorch."""
    sources = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*/*.py"))
    return sorted(name for text in sources for name in re.findall(r'^    name: ClassVar\[str\] = "(.+)"$', text, re.M))


def unknown_method(name: object, known: Iterable[str]) -> TersorError:
    return TersorError(f"unknown method {name!r}; known: {', '.join(known)}")


def methods() -> dict[str, type[Method]]:
    """All methods by name."""
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "tersor.methods."):
        importlib.import_module(module.name)
    return dict(sorted(_METHODS.items()))


def from_options(name: str, options: Mapping[str, Any]) -> Method:
    """Make a method from its name and options. Raises TersorError naming what is unknown."""
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise unknown_method(name, known)
    fields = {f.name for f in dataclasses.fields(known[name])}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise TersorError(f"method {name} has no option {unknown[0]!r}; it has {', '.join(sorted(fields))}")
    return known[name](**options)


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Collection[str] = (),
    check: Callable[[Any], bool] | None = None,
    allowed: str = "",
    flag: str | None = None,
    word: bool = False,
) -> Any:
    """A field of a method.

    help: what `--help` says. least, above, most, below: bounds of a number; choices: the words that it may be; check: whether a
    value is allowed, where these do not say it, and allowed: the same in words, for the error. flag: on the command line, where
    it differs from the field's name. word: whether the option takes a word as well as a number.
    """
    bounds = {"{} or more": least, "above {}": above, "at most {}": most, "below {}": below}

    def within(value: Any) -> bool:
        return (value is None and default is None) or (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    if choices:
        check, allowed = lambda value: value in choices, f"one of {', '.join(choices)}"
    elif least is not None and most is not None:
        check, allowed = within, f"{least} to {most}"
    elif any(bound is not None for bound in bounds.values()):
        check, allowed = within, ", ".join(words.format(at) for words, at in bounds.items() if at is not None)
    return field(
        default=default, metadata={"help": help, "check": check, "allowed": allowed, "flag": flag, "word": word}
    )


def as_words(each: dataclasses.Field[Any], value: Any) -> list[str]:
    """An option's value as words of a command: its flag and the value, for each of several values. None, and a switch at
    its default, are left out; where a switch has only one flag, that is the only way to say so."""
    if value is None:
        return []
    dashed = each.name.replace("_", "-")
    first, _, second = (each.metadata.get("flag") or f"--{dashed}/--no-{dashed}").partition("/")
    if isinstance(value, bool):
        return [] if value == each.default else [first if value else second]
    return [word for one in (value if isinstance(value, tuple) else (value,)) for word in (first, str(one))]


def check_options(method: Method) -> None:
    """Check every option. Raises TersorError with the offending value."""
    for each in dataclasses.fields(method):
        check, value = each.metadata.get("check"), getattr(method, each.name)
        check_number(each.name, value)
        if not _is_like(value, each.default) and not each.metadata.get("word"):
            allowed = each.metadata.get("allowed") or f"a value such as {each.default!r}"
            raise TersorError(f"{each.name}={value!r} is not allowed: {allowed}")
        try:
            allowed = check is None or bool(check(value))
        except (TypeError, ValueError, AttributeError):  # such as a list in place of a number
            allowed = False
        if not allowed:
            raise TersorError(f"{each.name}={value!r} is not allowed: {each.metadata['allowed']}")


def _is_like(value: Any, default: Any) -> bool:
    """Whether an option's value is of the same kind as its default. A default of None allows any kind."""
    if isinstance(default, bool) or isinstance(value, bool):
        return default is None or (isinstance(default, bool) and isinstance(value, bool))
    if isinstance(default, float):
        return isinstance(value, int | float)
    return not isinstance(default, int | str) or isinstance(value, type(default))
