"""What a user can ask of a job beside its method: each setting is declared once, here.

The arguments of `tersor.compress`, the options of `tersor quantize` and `tersor compress`, the keys of a sweep, the check of a
resumed job and the table in the docs are made from these fields. A setting that does nothing for a job is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersor.calibrate.activations import PLACES
from tersor.calibrate.batches import Calibration
from tersor.calibrate.routing import Routing, parse_routing
from tersor.compress.recipe import Recipe
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.formats.layout import Layout
from tersor.formats.layouts import layout_named
from tersor.methods.method import BlockMethod, Method, PackedMethod
from tersor.progress import Progress, silent
from tersor.untrusted import check_seed

AUTO = "auto"
IN_PYTHON = "given in Python"  # what a record says of samples that came from no file
SAMPLES, TOKENS = 1 << 20, 1 << 30  # at most


def setting(
    default: Any,
    help: str,
    *,
    blocks: bool = False,
    by_name: bool = False,
    packed: bool = False,
    decides: bool = False,
    flag: str = "",
    typed: type | None = None,
) -> Any:
    """A setting. blocks: only for methods that go block by block. packed: only for those that work on a packed model. by_name:
    only for a model given by name, not for a module in memory. decides: whether it changes the bytes of the result by itself.
    flag: its name on the command line where that is not simply its own. typed: what the command line takes, where the field
    takes more; `object` for nothing."""
    about = {"help": help, "blocks": blocks, "packed": packed, "by_name": by_name, "decides": decides}
    return field(default=default, metadata={**about, "flag": flag, "typed": typed})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises TersorError where a value is not allowed."""

    calibration: Calibration = setting(
        None,
        "A text file (.gz too), `builtin`, or `hf:NAME`; for images a folder of classes or a packed .npz.",
        typed=str,
    )
    samples: int = setting(128, "Calibration samples.")
    seq_len: int = setting(2048, "Tokens a sample; at most what the model has positions for.")
    seed: int = setting(0, "Seed of the choice of samples.")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", by_name=True)
    format: str | None = setting(
        AUTO,
        "gptq, gptq_v2, compressed-tensors, safetensors, or auto: gptq where it holds every layer, else compressed-tensors; "
        "safetensors for what is pruned only.",
        blocks=True,
        decides=True,
        typed=str,
    )
    dtype: str = setting(
        "auto", "Precision of the forward passes: auto, float32, bfloat16, float16.", by_name=True, decides=True
    )
    out: Path | None = setting(
        None, "Directory to write; must not exist, or hold this job unfinished.", by_name=True, typed=object
    )
    overwrite: bool = setting(False, "Replace what is in --out.", by_name=True)
    redo: tuple[str, ...] = setting(
        (), "Solve the blocks of layers that match again, in a finished result.", blocks=True, by_name=True
    )
    include: tuple[str, ...] = setting((), "Only layers that match, such as `*.mlp.*`.", decides=True)
    exclude: tuple[str, ...] = setting((), "Not layers that match.", decides=True)
    head: bool = setting(False, "Quantize the output head too.", blocks=True, decides=True)
    embeddings: bool = setting(
        False, "Quantize the token embedding too, in format compressed-tensors.", blocks=True, decides=True
    )
    target_bits: float | None = setting(
        None,
        "Bits a weight in all, such as 3.25: measures what each layer needs (on 16 samples, outputs on 256 tokens of 8), and "
        "gives it 2, 3, 4 or 8.",
        blocks=True,
        decides=True,
    )
    target_tp: int = setting(1, "Check that the layers split over so many devices when served.", blocks=True)
    experts: str = setting(
        "as-is",
        "Experts that calibrate with a token: as-is, top-k:N, or all, by the router's weight.",
        blocks=True,
        decides=True,
    )
    activations: str = setting(
        "device", "Where samples wait between blocks: device, cpu or disk.", blocks=True, by_name=True
    )
    original: Any = setting(
        None, "The model that was packed: a directory or a name. A recipe of steps knows it.", packed=True, typed=str
    )
    allow_pickle: bool = setting(False, "Read pickled weights (.bin) too.", by_name=True)
    tokenizer: Any = setting(None, "The tokenizer of a text, where the model has none of its own.", typed=object)
    progress: Progress = setting(silent, "Called as progress(what, done, total).", typed=object)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 1:
            raise TersorError(f"samples={self.samples} and seq_len={self.seq_len} must be positive")
        if self.samples > SAMPLES or self.seq_len > TOKENS:
            raise TersorError(
                f"samples={self.samples} and seq_len={self.seq_len} are more than any calibration has: {SAMPLES}, {TOKENS}"
            )
        check_seed(self.seed)
        if self.activations not in PLACES:
            raise TersorError(f"activations={self.activations!r} is not one of {', '.join(PLACES)}")
        if self.target_bits is not None and not 2 < self.target_bits <= 9:
            raise TersorError(f"target_bits={self.target_bits} is not above 2 and at most 9")
        if self.target_tp < 1:
            raise TersorError(f"target_tp={self.target_tp} must be positive")


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """Settings with what they mean: what a driver needs to know."""

    recipe: Recipe
    layout: Layout | None  # None: exact numbers, in memory only
    may_pad: bool  # whether compressed-tensors takes the place of `layout` where a layer does not fit it
    place: torch.device  # where the model runs
    routing: Routing  # which experts the samples visit
    history: tuple[Mapping[str, Any], ...] = ()  # the steps before this one, as their methods' options
    started: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The methods of all steps up to this one; empty where there is only one."""
        return [*map(dict, self.history), self.recipe.method.options()] if self.history else []


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Raises TersorError where a name is unknown or a value not allowed. An argument of None is one that was not given."""
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
    if "out" in values:
        values["out"] = Path(values["out"]).expanduser().absolute()  # `demo` is the user's directory here
    given_samples = values.get("calibration")
    if given_samples is not None and not isinstance(given_samples, str | Path):
        values["calibration"] = list(given_samples)  # for every step, and for a job that starts anew in float32
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
    """What decides the bytes of a result beside model and calibration, by the names under which the user gives it."""
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
    """What a job was asked beside its method, where that is no default: with it the job can be done again. As JSON has it;
    `calibration` is IN_PYTHON where the samples were no file's. Without `target_bits`, in whose place the rules are that it
    chose."""
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
    """The format of a job that names none."""
    return recipe.method.layouts[0] if isinstance(recipe.method, BlockMethod) else "gptq"


def applies(each: dataclasses.Field[Any], methods: Sequence[type[Method]], *, by_name: bool) -> bool:
    """Whether a setting does anything for a job of these methods."""
    if each.metadata["blocks"] and not any(issubclass(method, BlockMethod) for method in methods):
        return False
    if each.metadata["packed"] and not any(issubclass(method, PackedMethod) for method in methods):
        return False
    return by_name or not each.metadata["by_name"]


def refuse_idle(settings: Settings, methods: Sequence[Method], *, by_name: bool) -> None:
    """Raise TersorError for a setting that was given and would do nothing."""
    for each in dataclasses.fields(Settings):
        value = getattr(settings, each.name)
        if applies(each, [type(method) for method in methods], by_name=by_name) or value == each.default:
            continue
        if each.name == "format" and value is None and not by_name:
            continue  # exact numbers are what every method on a whole model gives
        if each.name == "out":
            raise TersorError(
                "a module in memory is compressed in memory: call save(directory) on the result, not out="
            )
        if each.metadata["by_name"] and not by_name:
            raise TersorError(f"{each.name}={value!r} does nothing for a module in memory; leave it out")
        how = "does not compare with it" if each.metadata["packed"] else "works on the whole model"
        raise TersorError(f"{each.name}={value!r} does nothing for method {methods[0].name}, which {how}; leave it out")
