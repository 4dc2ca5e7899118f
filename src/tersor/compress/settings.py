"""What a user can ask of a job beside its method. Each setting is declared once, here.

The arguments of `tersor.compress`, the options of `tersor quantize` and `tersor compress`, the keys of a sweep, the check of a
resumed job and the table in the docs are made from these fields. A setting says when it does something (`only`); otherwise it is
refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from tersor.calibrate.activations import PLACES
from tersor.calibrate.batches import Calibration
from tersor.calibrate.routing import Routing, parse_routing
from tersor.checkpoint.room import Held
from tersor.compress.conditions import (
    BLOCKS,
    BY_NAME,
    DRAWN,
    LAYERS,
    OUT,
    PACKED,
    PACKING,
    SAMPLES,
    STATISTICS,
    TEXT,
    Asked,
    Condition,
)
from tersor.compress.recipe import Recipe
from tersor.devices import DType, name_of_dtype, pick_device
from tersor.errors import TersorError
from tersor.formats.layout import Layout
from tersor.formats.layouts import layout_named
from tersor.methods.method import BlockMethod, Method
from tersor.progress import Progress, silent
from tersor.untrusted import check_seed

AUTO = "auto"
IN_PYTHON = "given in Python"  # what a record says of samples that came from no file
MOST_SAMPLES, MOST_TOKENS = 1 << 20, 1 << 30


def setting(
    default: Any,
    help: str,
    *,
    only: Sequence[Condition] = (),
    decides: bool = False,
    typed: type | None = None,
) -> Any:
    """A field of `Settings`.

    only: conditions that must all hold, else the setting does nothing and is refused.
    decides: whether it changes the bytes of the result by itself.
    typed: the type that the command line takes, where the field takes more; `object`: not on the command line.
    """
    return field(default=default, metadata={"help": help, "only": only, "decides": decides, "typed": typed})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises TersorError where a value is not allowed."""

    calibration: Calibration = setting(
        None,
        "A text file (.gz too), `builtin`, or `hf:NAME`; for images a folder of classes or a packed .npz.",
        typed=str,
    )
    samples: int = setting(128, "Calibration samples.", only=(SAMPLES,))
    seq_len: int = setting(2048, "Tokens a sample; at most what the model has positions for.", only=(SAMPLES, TEXT))
    seed: int = setting(0, "Seed of the choice of samples.", only=(SAMPLES, DRAWN))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", only=(BY_NAME,))
    format: str | None = setting(
        AUTO,
        "gptq, gptq_v2, compressed-tensors, safetensors, or auto: gptq where it holds every layer, else compressed-tensors; "
        "safetensors for what is pruned only.",
        decides=True,
        typed=str,
        only=(BLOCKS,),
    )
    dtype: DType = setting(
        "auto",
        "Precision of the forward passes: auto, float32, bfloat16, float16.",
        decides=True,
        typed=str,
        only=(BY_NAME,),
    )
    out: Path | None = setting(
        None,
        "Directory to write; must not exist, or hold this job unfinished.",
        typed=object,
        only=(BY_NAME,),
    )
    overwrite: bool = setting(False, "Replace what is in --out.", only=(BY_NAME, OUT))
    redo: tuple[str, ...] = setting(
        (),
        "Solve the blocks of layers that match again, in a finished result.",
        only=(BLOCKS, BY_NAME, OUT),
    )
    include: tuple[str, ...] = setting((), "Only layers that match, such as `*.mlp.*`.", decides=True, only=(LAYERS,))
    exclude: tuple[str, ...] = setting((), "Not layers that match.", decides=True, only=(LAYERS,))
    head: bool = setting(False, "Quantize the output head too.", decides=True, only=(BLOCKS,))
    embeddings: bool = setting(
        False,
        "Quantize the token embedding too, in format compressed-tensors.",
        decides=True,
        only=(BLOCKS,),
    )
    target_bits: float | None = setting(
        None,
        "Bits a weight in all, such as 3.25: measures what each layer needs (on 16 samples, outputs on 256 tokens of 8), and "
        "gives it 2, 3, 4 or 8.",
        decides=True,
        only=(BLOCKS,),
    )
    target_tp: int = setting(1, "Check that the layers split over so many devices when served.", only=(PACKING,))
    experts: str = setting(
        "as-is",
        "Experts that calibrate with a token: as-is, top-k:N, or all, by the router's weight.",
        decides=True,
        only=(STATISTICS,),
    )
    activations: str = setting(
        "device",
        "Where samples wait between blocks: device, cpu or disk.",
        only=(STATISTICS, BY_NAME),
    )
    original: Any = setting(
        None,
        "The model that was packed: a directory or a name. A recipe of steps knows it.",
        typed=str,
        only=(PACKED,),
    )
    allow_pickle: bool = setting(False, "Read pickled weights (.bin) too.", only=(BY_NAME,))
    tokenizer: Any = setting(None, "The tokenizer of a text, where the model has none of its own.", typed=object)
    progress: Progress = setting(silent, "Called as progress(what, done, total).", typed=object)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 1:
            raise TersorError(f"samples={self.samples} and seq_len={self.seq_len} must be positive")
        if self.samples > MOST_SAMPLES or self.seq_len > MOST_TOKENS:
            raise TersorError(
                f"samples={self.samples} and seq_len={self.seq_len} are more than any calibration has: {MOST_SAMPLES}, "
                f"{MOST_TOKENS}"
            )
        check_seed(self.seed)
        if not callable(self.progress):
            raise TersorError(
                f"progress={self.progress!r} is no function of (what, done, total); leave it out for silence"
            )
        if self.activations not in PLACES:
            raise TersorError(f"activations={self.activations!r} is not one of {', '.join(PLACES)}")
        if self.target_bits is not None and not 2 < self.target_bits <= 9:
            raise TersorError(f"target_bits={self.target_bits} is not above 2 and at most 9")
        if self.target_tp < 1:
            raise TersorError(f"target_tp={self.target_tp} must be positive")


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """A user's settings, and what they mean for one run of the driver."""

    recipe: Recipe
    layout: Layout | None  # None: exact numbers, in memory only
    may_pad: bool  # whether compressed-tensors takes the place of `layout` where a layer does not fit it
    place: torch.device  # where the model runs
    routing: Routing  # which experts the samples visit
    held: Held | None = None  # on `out`, where this run writes the whole job's result
    history: tuple[Mapping[str, Any], ...] = ()  # the steps before this one, as their methods' options
    started: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The methods of all steps up to this one; empty where there is only one."""
        return [*map(dict, self.history), self.recipe.method.options()] if self.history else []

    def wants(self, layer: str) -> bool:
        """Whether the user asked for this layer."""
        included = not self.include or any(fnmatchcase(layer, pattern) for pattern in self.include)
        excluded = any(fnmatchcase(layer, pattern) for pattern in self.exclude)
        return included and not excluded and self.recipe.method_for(layer) is not None

    def check_patterns(self, layers: Sequence[str]) -> None:
        """Raise TersorError where a rule or a pattern matches none of the layers."""
        self.recipe.check_matches(layers)
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise TersorError(f"the pattern {pattern!r} matches none of the {len(layers)} linear layers")


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings from arguments. None means not given. Raises TersorError where a name is unknown or a value not allowed."""
    known = {each.name: each for each in dataclasses.fields(Settings)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise TersorError(f"compress has no setting {name!r}; {hint}")
    values = {name: value for name, value in given.items() if value is not None or name == "format"}
    for name in ("redo", "include", "exclude"):
        if name in values:
            values[name] = _patterns(name, values[name])
    if "dtype" in values:
        values["dtype"] = name_of_dtype(values["dtype"])  # it is kept in records and commands
    if "out" in values:
        values["out"] = Path(values["out"]).expanduser().absolute()  # `demo` is the user's directory here
    given_samples = values.get("calibration")
    if given_samples is not None and not isinstance(given_samples, str | Path):
        values["calibration"] = list(given_samples)  # it is read more than once: by every step, and again in float32
    return Settings(**values)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TersorError(f"{name}={value!r} is no list of patterns; give one such as ['*.mlp.*']")
    return tuple(value)


def job_of(recipe: Recipe, settings: Settings, *, history: Sequence[Mapping[str, Any]] = ()) -> Job:
    """Raises TersorError where a value is not allowed."""
    format = settings.format
    asked = {each.name: getattr(settings, each.name) for each in dataclasses.fields(Settings)}
    return Job(
        **asked,
        recipe=recipe,
        layout=None if format is None else layout_named(_usual(recipe) if format == AUTO else format),
        may_pad=format == AUTO,
        place=pick_device(settings.device),
        routing=parse_routing(settings.experts),
        history=tuple(history),
    )


def asked_of(job: Job, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
    """What decides the bytes of a result beside model and calibration, by the names of options and settings."""
    options = {("method" if key == "name" else key): value for key, value in job.recipe.method.options().items()}
    meant = {"format": layout.name, "dtype": dtype, "experts": job.routing}
    settings = {
        each.name: meant.get(each.name, getattr(job, each.name))
        for each in dataclasses.fields(Settings)
        if each.metadata["decides"]
    }
    asked = {**options, "rules": job.recipe.rules, **settings}
    return {key: str(value) for key, value in asked.items()}


def recorded(job: Settings) -> dict[str, Any]:
    """The settings that are not at their defaults, for JSON: with them and its method the job can be done again. `calibration` is
    IN_PYTHON where a program gave the samples. `target_bits` is left out: the rules that it chose take its place."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(Settings):
        value = getattr(job, each.name)
        if each.name == "target_bits":
            continue
        if (each.metadata["decides"] or each.name in ("samples", "seq_len", "seed")) and value != each.default:
            found[each.name] = list(value) if isinstance(value, tuple) else value
    if job.calibration is not None:
        found["calibration"] = str(job.calibration) if isinstance(job.calibration, str | Path) else IN_PYTHON
    return found


def _usual(recipe: Recipe) -> str:
    """The format where the user names none."""
    return recipe.method.layouts[0] if isinstance(recipe.method, BlockMethod) else "gptq"


def applies(each: dataclasses.Field[Any], methods: Sequence[Method], *, by_name: bool) -> bool:
    """Whether a setting can do something for these methods, whatever else is asked."""
    asked = Asked(Settings(calibration="builtin", out=Path("out")), methods, by_name)
    return all(condition.holds(asked) for condition in each.metadata["only"])


def idle(settings: Settings, methods: Sequence[Method], *, by_name: bool) -> dict[str, str]:
    """The settings that were given and would do nothing, each with the reason. methods: of all steps and rules."""
    asked = Asked(settings, methods, by_name)
    found: dict[str, str] = {}
    for each in dataclasses.fields(Settings):
        value = getattr(settings, each.name)
        if value == each.default or (each.name == "format" and value is None and not by_name):
            continue  # a format of None means exact numbers, which every method gives in memory
        unmet = next((one for one in each.metadata["only"] if not one.holds(asked)), None)
        if unmet is not None:
            names = " and ".join(dict.fromkeys(method.name for method in methods))
            found[each.name] = (
                f"{each.name}={value!r} does nothing with {names}: it counts for {unmet.counts_for}; leave it out"
            )
    return found


def refuse_idle(settings: Settings, methods: Sequence[Method], *, by_name: bool) -> None:
    """Raise TersorError for a setting that was given and would do nothing."""
    found = idle(settings, methods, by_name=by_name)
    if "out" in found:
        raise TersorError("a module in memory is compressed in memory: call save(directory) on the result, not out=")
    for reason in found.values():
        raise TersorError(reason)


def counting(given: Mapping[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """The given settings without those that would do nothing for a model that is given by name and written to a directory."""
    ignored = idle(settings_of({**given, "out": "out"}), methods, by_name=True)
    return {name: value for name, value in given.items() if name not in ignored}
