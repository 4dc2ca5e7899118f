"""`tersor.compress`: apply a method, or a recipe of several, to a model."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from tersor.calibrate.parallel import once, processes
from tersor.checkpoint.room import alone_in
from tersor.checkpoint.source import open_checkpoint
from tersor.compress.driver import compress_module
from tersor.compress.packed import compress_packed_checkpoint, compress_packed_module
from tersor.compress.recipe import Recipe, Rule, make_rules
from tersor.compress.result import Compressed
from tersor.compress.run_record import check_unfinished, keep_run
from tersor.compress.settings import Job, Settings, job_of, refuse_idle, settings_of
from tersor.compress.steps import asked_for, run_steps
from tersor.compress.stream import compress_checkpoint
from tersor.compress.target_bits import with_chosen_bits
from tersor.compress.whole_model import compress_whole_checkpoint, compress_whole_module
from tersor.errors import TersorError
from tersor.methods.method import BlockMethod, Method, PackedMethod


def compress(
    model: str | Path | nn.Module,
    method: Method | Sequence[Method | Recipe],
    *,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    **settings: Any,
) -> Compressed:
    """Compress a model with one method, with several by rules, or in several steps.

    model: a directory, a hub name or a built-in name, which is read block by block and written to `out` (a temporary directory
        where none is given) as blocks are finished; or a module in memory, of which a compressed copy is made.
    method: a method; or a list of methods (or `Recipe`s, which hold rules) that run one after another, each on the result of the
        last.
    rules: what is different for some layers (see `recipe.py`), such as {"match": "*.down_proj", "bits": 8}; the last that
        matches wins.

    The settings:

    calibration: a text file, "builtin" (also None), "hf:NAME", a list of strings, or an iterable of the model's own inputs.
    format: how the result is stored, which also bounds its precision: "gptq", "gptq_v2", "compressed-tensors", or "safetensors"
        for plain numbers; "auto" is "gptq" where it holds every layer, else "compressed-tensors", and "safetensors" for what is
        pruned only; None keeps exact numbers, for a module in memory only.
    include, exclude: patterns of linear layers, such as "*.mlp.*". head: compress the output head too. embeddings: the token
        embedding too, rounded to nearest with the method's options, as it has no inputs; in format compressed-tensors.
    redo: patterns of layers whose blocks are solved again although an earlier run of the same job finished them.
    target_bits: bits a weight in all; each layer gets bits and a group size by what they do to the model's predictions.
    target_tp: check that every layer can be split over so many devices for tensor-parallel serving.
    experts: which experts of a mixture the samples visit while statistics are gathered: "as-is" (those that the router
        chooses), "top-k:N" (the N best), or "all" (every token counts for every expert, by the router's weight).
    activations: where samples wait between blocks: "device", "cpu" or "disk".
    original: the model that was packed, for a method that tunes a packed one: a directory, a name or a module.
    allow_pickle: read pickled weights (.bin), which are opened without running any code in them, but by Python's unpickler.
    progress: called as progress(what, done, total).
    samples, seq_len, seed, device, dtype, out, overwrite, tokenizer: as `tersor quantize --help` says (`settings.py`).

    Raises TersorError on bad input, also where a setting would do nothing, before anything is written, and where another job
    writes to `out`. An interrupted job goes on when called again with the same arguments and `out`; for a finished one that is
    a FinishedError.
    """
    asked, steps = settings_of(settings), _steps(method, rules)
    refuse_idle(asked, [step.method for step in steps], by_name=not isinstance(model, nn.Module))
    with ExitStack() as stack:
        mark = None
        if asked.out is not None:
            lock = alone_in(asked.out)
            once(lambda: stack.enter_context(lock))
            source = open_checkpoint(str(model), allow_pickle=asked.allow_pickle)
            said = json.dumps(asked_for(source, steps, asked), sort_keys=True)
            mark = hashlib.sha256(said.encode()).hexdigest()
            if not asked.overwrite and not asked.redo:
                check_unfinished(asked.out, mark)
        if len(steps) > 1:
            result = run_steps(model, steps, asked, run_job)
        else:
            result = run_job(model, job_of(steps[0], asked))
        return keep_run(result, model, steps, asked, mark)


def _steps(method: Method | Sequence[Method | Recipe], rules: Sequence[Rule | Mapping[str, Any]]) -> list[Recipe]:
    if isinstance(method, Method):
        return [Recipe(method, make_rules(rules))]
    if not method or not all(isinstance(each, Method | Recipe) for each in method):
        raise TersorError(f"{method!r} is no method and no list of methods")
    if rules:
        raise TersorError("rules belong to one method; in a list of steps give tersor.compress.Recipe(method, rules)")
    return [each if isinstance(each, Recipe) else Recipe(each) for each in method]


def run_job(model: str | Path | nn.Module, job: Job) -> Compressed:
    """One step: one method, with its rules, on one model."""
    method = job.recipe.method
    whole = not isinstance(method, BlockMethod)
    if whole and processes() > 1:
        raise TersorError(f"{method.name} runs in one process: start it without torchrun")
    if isinstance(method, PackedMethod):
        return (
            compress_packed_module(model, job)
            if isinstance(model, nn.Module)
            else compress_packed_checkpoint(str(model), job)
        )
    if job.target_bits is not None:
        job = with_chosen_bits(model if isinstance(model, nn.Module) else str(model), job)
    if isinstance(model, nn.Module):
        return compress_whole_module(model, job) if whole else compress_module(model, job)
    return compress_whole_checkpoint(str(model), job) if whole else compress_checkpoint(str(model), job)


def _with_settings() -> inspect.Signature:
    """What `help(tersor.compress)` shows."""
    own = [each for name, each in inspect.signature(compress).parameters.items() if name != "settings"]
    more = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in dataclasses.fields(Settings)
    ]
    return inspect.Signature([*own, *more], return_annotation="Compressed")


compress.__signature__ = _with_settings()  # type: ignore[attr-defined]
