"""Recipes of a sweep: YAML files with the names of `tersor quantize`'s options; lists of values make a grid.

model: demo                    # what to compress; a list for several
method: [gptq, rtn]
bits: [3, 4]
group_size: 64
damp: 0.02                     # rtn has no such option: it goes to gptq alone
samples: 32                    # and rtn looks at none
rules:                         # as in `tersor quantize --recipe`
  - {match: "*.down_proj", bits: 8}
eval: {text: builtin, seq_len: 512, max_windows: 16}    # perplexity of each result; `eval: builtin` for the defaults

`include`, `exclude` and `rules` are lists in themselves: give a list of lists to try several.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.compress.recipe import Recipe, make_rules, recipe_content
from tersor.compress.settings import Settings, idle, settings_of
from tersor.errors import TersorError
from tersor.methods.method import from_options, methods, unknown_method

JOBS = 10_000  # of one recipe: more is a mistake
LISTS = ("include", "exclude", "rules")  # a list is one value of these


@dataclass(frozen=True)
class SweepJob:
    """One combination of a recipe's values."""

    name: str  # of its directory and its row
    values: dict[str, Any]  # one value per key of the recipe

    @property
    def method(self) -> str:
        return str(self.values.get("method", "gptq"))

    def options(self) -> dict[str, Any]:
        """The options of the method."""
        return {key: value for key, value in self.values.items() if key in _fields(self.method)}

    def settings(self) -> dict[str, Any]:
        """The other arguments of `compress`."""
        names = {"rules", *_settings()} - _fields(self.method)
        return {key: value for key, value in self.values.items() if key in names}

    def evaluation(self) -> dict[str, Any] | None:
        """The arguments of `perplexity`, where it is asked for."""
        asked = self.values.get("eval")
        return {"text": asked} if isinstance(asked, str) else asked


def read_jobs(paths: Iterable[str | Path], *, models: Sequence[str] = ()) -> list[SweepJob]:
    """The jobs of all recipes; `models` takes the place of `model` in each. Raises TersorError before anything is run."""
    jobs: dict[str, SweepJob] = {}
    for path in map(Path, paths):
        recipe = recipe_content(path, wanted="`model: NAME` and options")
        for job in jobs_of(path.stem, recipe | ({"model": list(models)} if models else {}), str(path)):
            if job.name in jobs:
                raise TersorError(f"{path}: another recipe is called {job.name} too; rename one of the files")
            jobs[job.name] = job
    if not jobs:
        raise TersorError("no recipes: give one or more YAML files")
    return list(jobs.values())


def jobs_of(name: str, recipe: Mapping[str, Any], where: str) -> list[SweepJob]:
    """One job for each combination of the recipe's values, named after those that vary."""
    choices = {key: _choices(key, value) for key, value in recipe.items()}
    chosen = [str(each) for each in choices.get("method", ["gptq"])]
    _check_keys(recipe, chosen, where)
    if (count := math.prod(map(len, choices.values()))) > JOBS:
        raise TersorError(f"{where}: the grid has {count:,} jobs; at most {JOBS:,} are run")
    varied = [key for key, values in choices.items() if len(values) > 1]
    jobs: dict[str, SweepJob] = {}
    ignored: list[dict[str, str]] = []  # by each job
    for indices in itertools.product(*(range(len(values)) for values in choices.values())):
        index = dict(zip(choices, indices, strict=True))
        values = {key: choices[key][n] for key, n in index.items()}
        fields = _fields(str(values.get("method", "gptq")))
        foreign = {key for method in chosen for key in _fields(method)} - fields
        values = {key: value for key, value in values.items() if key not in foreign}
        try:
            method = from_options(str(values.get("method", "gptq")), {k: v for k, v in values.items() if k in fields})
            asked = {key: value for key, value in values.items() if key in _settings() and key not in fields}
            steps = Recipe(method, make_rules(values.get("rules") or ())).methods
            ignored.append(idle(settings_of({**asked, "out": "out"}), steps, by_name=True))
        except TersorError as error:
            raise TersorError(f"{where}: {error}") from None
        values = {key: value for key, value in values.items() if key not in ignored[-1]}
        parts = [f"{key}={index[key] if key in LISTS else values[key]}" for key in varied if key in values]
        job = SweepJob(re.sub(r"[^\w.,=-]+", "-", ",".join([name, *parts])), values)
        if jobs.setdefault(job.name, job) != job:
            raise TersorError(f"{where}: two jobs of this grid would both be called {job.name}; write two recipes")
    for key, reason in ignored[0].items():
        if all(key in each for each in ignored):
            raise TersorError(f"{where}: {reason}")
    return list(jobs.values())


def _choices(key: str, value: Any) -> list[Any]:
    if key in LISTS:
        return value if isinstance(value, list) and value and all(isinstance(each, list) for each in value) else [value]
    return value if isinstance(value, list) else [value]


def _check_keys(recipe: Mapping[str, Any], chosen: Sequence[str], where: str) -> None:
    for method in chosen:
        if method not in methods():
            raise TersorError(f"{where}: {unknown_method(method, methods())}")
    options = {field for method in chosen for field in _fields(method)}
    _check_known(recipe, {"model", "method", "rules", "eval", *_settings(), *options}, where)
    if not recipe.get("model"):
        raise TersorError(f"{where} names no model: add `model: NAME`, or give --model")
    for key, values in ((key, _choices(key, recipe[key])) for key in recipe):
        if not values:
            raise TersorError(f"{where}: {key} is an empty list")
        default = _settings()[key].default if key in _settings() else None
        for value in values:
            mistaken = isinstance(value, bool) != isinstance(default, bool) and key not in LISTS
            if default is not None and (mistaken or not isinstance(value, list if key in LISTS else type(default))):
                raise TersorError(f"{where}: {key}={value!r} must be a {type(default).__name__}, such as {default!r}")
    for key in ("model", "method", "calibration"):
        if (
            odd := next((v for v in _choices(key, recipe.get(key, "")) if not isinstance(v, str | None)), None)
        ) is not None:
            raise TersorError(f"{where}: {key}={odd!r} must be a name")
    for key in ("include", "exclude"):
        for value in _choices(key, recipe.get(key, [])):
            if (odd := next((each for each in value if not isinstance(each, str)), None)) is not None:
                raise TersorError(f"{where}: {key} holds {odd!r}; patterns of layer names are expected")
    asked = recipe.get("eval")
    if isinstance(asked, Mapping):
        kinds = {"text": str, "seq_len": int, "max_windows": int, "dtype": str, "device": str}
        _check_known(asked, set(kinds), f"{where}, eval")
        for key, value in asked.items():
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise TersorError(f"{where}, eval: {key}={value!r} must be a {kinds[key].__name__}")
    elif asked is not None and not isinstance(asked, str):
        raise TersorError(f"{where}: eval={asked!r} must be a text file, `builtin`, or options of `tersor eval`")


def _check_known(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise TersorError(f"{where}: unknown key {key!r}; {hint}")


def _fields(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(methods()[method])}


def _settings() -> dict[str, dataclasses.Field[Any]]:
    """The settings of a job that a recipe may hold."""
    own = ("out", "overwrite", "redo", "tokenizer", "progress")
    return {each.name: each for each in dataclasses.fields(Settings) if each.name not in own}
