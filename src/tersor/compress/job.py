"""`tersor.compress`: apply a method, or several one after another, to a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tersor.checkpoint.hashes import hash_of_json
from tersor.checkpoint.room import Held, alone_in
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.compress.driver import compress_module
from tersor.compress.packed import compress_packed_checkpoint, compress_packed_module
from tersor.compress.recipe import Recipe, Rule, make_rules
from tersor.compress.result import Compressed
from tersor.compress.run_record import check_unfinished, run_of, write_run
from tersor.compress.settings import Job, Settings, job_of, refuse_idle, settings_of
from tersor.compress.steps import asked_for, forget_steps, run_steps
from tersor.compress.stream import compress_checkpoint
from tersor.compress.target_bits import with_chosen_bits
from tersor.compress.whole_model import compress_whole_checkpoint, compress_whole_module
from tersor.errors import FinishedError, TersorError
from tersor.methods.method import BlockMethod, Method, PackedMethod
from tersor.processes import is_first, once, processes


def compress(
    model: Openable | nn.Module,
    method: Method | Sequence[Method | Recipe],
    *,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    **settings: Any,
) -> Compressed:
    """Compress a model with one method, with several by rules, or in several steps.

    model: a directory, a hub name or a built-in name: it is read block by block, and each finished block is written to `out` (or
        to a temporary directory). Or a module in memory: a compressed copy is made.
    method: one method, or a list of methods (or of `Recipe`s, which hold rules). Those of a list run one after another, each on
        the result of the one before.
    rules: what is different for some layers (see `recipe.py`), such as {"match": "*.down_proj", "bits": 8}. The last rule that
        matches a layer wins.

    The settings:

    calibration: a text file, "builtin" (also None), "hf:NAME", a list of strings, or an iterable of the model's own inputs.
    format: how the result is stored: "gptq", "gptq_v2", "compressed-tensors", or "safetensors" for plain numbers. The format also
        bounds the precision. "auto" is "gptq" where it holds every layer, else "compressed-tensors", and "safetensors" for what
        is pruned only. None keeps exact numbers, for a module in memory only.
    include, exclude: patterns of linear layers, such as "*.mlp.*".
    head: compress the output head too.
    embeddings: compress the token embedding too, in format compressed-tensors. It has no inputs, so it is rounded to nearest with
        the method's options.
    redo: patterns of layers. Their blocks are solved again although an earlier run of the same job finished them.
    target_bits: bits per weight, on average. Each layer gets the bits and the group size that suit the model's predictions.
    target_tp: check that every layer can be split over so many devices for tensor-parallel serving.
    experts: which experts of a mixture the samples visit while statistics are gathered: "as-is" (those that the router
        chooses), "top-k:N" (the N best), or "all" (every token counts for every expert, by the router's weight).
    activations: where samples wait between blocks: "device", "cpu" or "disk".
    original: the model that was packed, for a method that tunes a packed one: a directory, a name or a module.
    allow_pickle: read pickled weights (.bin) too. Python's unpickler opens them, and is kept from running code in them.
    progress: called as progress(what, done, total).
    samples, seq_len, seed, device, dtype, out, overwrite, tokenizer: as `tersor quantize --help` says (`settings.py`).

    Raises TersorError on bad input before anything is written, also for a setting that would do nothing, and where another job
    writes to `out`. An interrupted job goes on when it is called again with the same arguments and `out`; for a finished one
    that is a FinishedError.
    """
    asked, steps = settings_of(settings), _steps(method, rules)
    refuse_idle(asked, [each for step in steps for each in step.methods], by_name=not isinstance(model, nn.Module))
    with ExitStack() as stack:
        said, mark, held = None, None, Held()
        if asked.out is not None:
            lock = alone_in(asked.out)
            held = once(lambda: stack.enter_context(lock))
        if not isinstance(model, nn.Module | Checkpoint):
            model = open_checkpoint(str(model), allow_pickle=asked.allow_pickle)
        if asked.out is not None:
            assert isinstance(model, Checkpoint)  # `out` is refused beside a module
            said = asked_for(model, steps, asked)
            held.mark = mark = hash_of_json(said)
            if not asked.overwrite and not asked.redo and asked.tokenizer is None:
                once(partial(_check_unfinished, asked.out, mark, said))

        def run(at: Openable | nn.Module, job: Job) -> Compressed:
            last = asked.out is not None and job.out == asked.out
            return run_job(at, replace(job, held=held) if last else job)

        if len(steps) > 1:
            result = run_steps(model, steps, asked, run, said)
        else:
            result = run(model, job_of(steps[0], asked))
        result.run = {**run_of(result.summary, model, steps, asked), "asked": mark}
        if result.directory is not None and is_first():
            write_run(result.directory, result.run)
        return result


def _check_unfinished(out: Path, mark: str, said: Mapping[str, Any]) -> None:
    """Raise FinishedError where `out` holds the whole result. What a process that was killed in the end left between the steps is
    removed."""
    try:
        check_unfinished(out, mark)
    except FinishedError:
        forget_steps(out, said)
        raise


def _steps(method: Method | Sequence[Method | Recipe], rules: Sequence[Rule | Mapping[str, Any]]) -> list[Recipe]:
    if isinstance(method, Method):
        return [Recipe(method, make_rules(rules))]
    if not method or not all(isinstance(each, Method | Recipe) for each in method):
        raise TersorError(f"{method!r} is no method and no list of methods")
    if rules:
        raise TersorError("rules belong to one method; in a list of steps give tersor.compress.Recipe(method, rules)")
    return [each if isinstance(each, Recipe) else Recipe(each) for each in method]


def run_job(model: Openable | nn.Module, job: Job) -> Compressed:
    """One step: one method, with its rules, on one model."""
    method = job.recipe.method
    if processes() > 1 and not isinstance(method, BlockMethod):
        raise TersorError(f"{method.name} runs in one process: start it without torchrun")
    if not isinstance(model, nn.Module):
        model = open_checkpoint(model, allow_pickle=job.allow_pickle)
    if job.target_bits is not None:
        job = with_chosen_bits(model, job)
    if isinstance(model, nn.Module):
        if isinstance(method, PackedMethod):
            return compress_packed_module(model, job)
        return compress_module(model, job) if isinstance(method, BlockMethod) else compress_whole_module(model, job)
    if isinstance(method, PackedMethod):
        return compress_packed_checkpoint(model, job)
    if isinstance(method, BlockMethod):
        return compress_checkpoint(model, job)
    return compress_whole_checkpoint(model, job)


def _with_settings() -> inspect.Signature:
    """What `help(tersor.compress)` shows."""
    own = [each for name, each in inspect.signature(compress).parameters.items() if name != "settings"]
    more = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in dataclasses.fields(Settings)
    ]
    return inspect.Signature([*own, *more], return_annotation="Compressed")


compress.__signature__ = _with_settings()  # type: ignore[attr-defined]
