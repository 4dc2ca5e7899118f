"""Bits where they pay: each layer's number of bits and group size, from what it does to the model's predictions.

Each layer is tried alone with every candidate: 2, 3, 4 and 8 bits in groups as asked, 2 and 3 bits also in groups of 32. GPTQ
solves the layer on the samples, the solution takes the layer's place, and the model's output is compared with the original's (KL
divergence of predictions, of other outputs the relative squared error). Layers that read the same input (q, k and v; gate and up)
are taken together, because servers fuse them. Among all choices within the bytes that the target allows, scales and zero points
included, the one with the least sum of divergences is found exactly (`knapsack.py`). It becomes the rules of the recipe that the
job then runs. An unfinished job keeps its choice in its marks. The whole model is in memory while layers are tried.

Layers are solved on 16 samples and judged on 256 tokens of 8 samples, whatever the job's own number of samples is.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import (
    Batch,
    call,
    fingerprint,
    first_tensor,
    predicts,
    probe_of,
    without_cache,
    without_target,
)
from tersor.calibrate.statistics import kind_of
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype, dtypes_to_try
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.room import inputs_of
from tersor.checkpoint.source import Checkpoint, torch_dtype
from tersor.checkpoint.writer import ResultWriter, model_fingerprint
from tersor.compress.first_run import fitted
from tersor.compress.knapsack import choose
from tersor.compress.plan import make_plan, with_fitting_layout
from tersor.compress.recipe import Recipe, Rule, plain_rule
from tersor.compress.samples import probe_for, read_samples, samples_by_path
from tersor.compress.settings import AUTO, Job, asked_of
from tersor.errors import NotFiniteError, TersorError
from tersor.formats.compressed_tensors import COMPRESSED_TENSORS
from tersor.formats.grid import Bits, Stored
from tersor.formats.layout import UniformGrids
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import matrix_shape, set_weight_matrix, weight_matrix
from tersor.methods.method import Work
from tersor.methods.structure.greenformers import input_hessians, turns
from tersor.methods.weights.gptq import GPTQ
from tersor.methods.weights.gptq_solver import factorize
from tersor.methods.weights.uniform import width_of
from tersor.processes import processes
from tersor.progress import silent

BITS = (2, 3, 4, 8)
FINE = ((2, 32), (3, 32))  # bits and group size that are tried too
SOLVED_ON, JUDGED_ON, TOKENS = 16, 8, 256  # samples for the Hessians; samples and tokens of each to compare outputs on
CHOSEN = "chosen"  # the mark that keeps the choice


def with_chosen_bits(model: Checkpoint | nn.Module, job: Job) -> Job:
    """The job with the rules that its target asks for. Raises TersorError where there can be none."""
    method = job.recipe.method
    if not isinstance(method, GPTQ):
        raise TersorError(f"target_bits chooses for gptq, not for {method.name}: leave one of the two out")
    if any(not rule.skip for rule in job.recipe.rules):
        raise TersorError("target_bits makes the rules of a job itself: beside it rules can only skip layers")
    if job.embeddings:
        raise TersorError("with embeddings all layers need the same grids, so target_bits cannot choose: leave one out")
    if processes() > 1:
        raise TersorError("target_bits measures in one process: start it without torchrun")
    if isinstance(model, nn.Module):
        module = copy.deepcopy(model).eval()
        samples = _samples(module, job)
        return _with_rules(job, _choice(module, job, method, samples, next(model.parameters()).dtype))
    checkpoint = model
    if "quantization_config" in checkpoint.config or checkpoint.gguf is not None:
        return job  # the driver will say what is wrong with it
    job = replace(job, tokenizer=job.tokenizer or load_tokenizer(checkpoint.directory))
    writer = None
    if job.out is not None:
        writer = ResultWriter(job.out, checkpoint, inputs=inputs_of(checkpoint, calibration=job.calibration))
    tries = dtypes_to_try(
        checkpoint, job.place, job.dtype, earlier=lambda: None if writer is None else writer.mark("dtype")
    )
    for dtype in tries:
        if dtype != compute_dtype(checkpoint, job.place, job.dtype):
            job.progress("float16 overflows: measuring in float32", 0, 0)
        module = LazyModel(checkpoint, dtype=dtype, device=job.place).load_all().to(job.place).eval()
        samples = _samples(module, replace(job, calibration=samples_by_path(checkpoint, job)))
        if writer is not None:
            probe = probe_for(job, module, samples[0], job.place, dtype)
            assert probe is not None
            if (earlier := _earlier(writer, checkpoint, job, samples, probe, dtype)) is not None:
                return _with_rules(job, earlier)
        try:
            return _with_rules(job, _choice(module, job, method, samples, torch_dtype(checkpoint.config)))
        except NotFiniteError:
            if dtype == tries[-1]:
                raise
        del module  # before it is loaded again
    raise AssertionError("the last try returns or raises")


def chosen_mark(job: Job) -> dict[str, str]:
    """The mark that keeps the choice of a job; empty where it had none to make."""
    if job.target_bits is None:
        return {}
    rules = [plain_rule(rule) for rule in job.recipe.rules if not rule.skip]
    options = job.recipe.method.options()
    return {CHOSEN: json.dumps({"bits": options["bits"], "group_size": options["group_size"], "rules": rules})}


def _with_rules(job: Job, recipe: Recipe) -> Job:
    return replace(job, recipe=replace(recipe, rules=(*recipe.rules, *job.recipe.rules)))


def _samples(module: nn.Module, job: Job) -> list[Batch]:
    first = next(module.parameters())
    return [without_target(each) for each in read_samples(job, module, first.device, first.dtype)]


def _earlier(
    writer: ResultWriter, checkpoint: Checkpoint, job: Job, samples: list[Batch], probe: Batch, dtype: torch.dtype
) -> Recipe | None:
    """What an earlier run of this very job chose; None where there was none. Raises TersorError, before anything is measured,
    where the result may not be put into `out`."""
    assert job.layout is not None
    marks = {
        "model": model_fingerprint(checkpoint),
        **asked_of(job, job.layout, dtype),
        "calibration": fingerprint([*samples, probe]),
    }
    decided = {"bits", "group_size", "rules", *(["format"] if job.format == AUTO else [])}  # these the choice decides
    if not job.overwrite and all(writer.mark(key) == value for key, value in marks.items() if key not in decided):
        try:
            kept = json.loads(writer.mark(CHOSEN) or "")
            rules = [Rule(each["match"], {key: each[key] for key in ("bits", "group_size")}) for each in kept["rules"]]
            method = replace(job.recipe.method, bits=kept["bits"], group_size=kept["group_size"])  # type: ignore[call-arg]
        except (ValueError, LookupError, TypeError, TersorError):
            pass  # damaged: `check` below says so, where the job cannot go on
        else:
            return Recipe(method, tuple(rules))
    writer.check(marks, overwrite=job.overwrite, redo=bool(job.redo))
    return None


def _choice(module: nn.Module, job: Job, method: GPTQ, samples: list[Batch], stored: torch.dtype) -> Recipe:
    """The choice for a model in memory. Raises NotFiniteError where the model overflows."""
    fitting = with_fitting_layout(module, replace(job, progress=silent))
    module.requires_grad_(False)
    with torch.no_grad(), without_cache(module):
        probe = probe_of(samples[0], TOKENS)
        _, samples, _ = fitted(module, samples, probe, lambda batch: call(module, batch))
        kept = Stored(stored) if fitting.layout is None else fitting.layout.stored(stored)
        items, rest = _measure(module, fitting, method, samples, kept)
    return _recipe(items, rest, method, job)


@dataclass
class _Item:
    """Layers that are chosen together."""

    names: list[str]
    shapes: list[tuple[int, int]]
    options: list[tuple[tuple[int, int], int, float]] = field(
        default_factory=list
    )  # (bits, group size), bytes, divergence

    @property
    def numbers(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass
class _Rest:
    """Layers that keep the bits that the job asks for: no sample calls them, but others of their kind are compressed."""

    names: list[str]
    numbers: int
    size: int  # their bytes


def _measure(
    module: nn.Module, job: Job, method: GPTQ, samples: list[Batch], stored: Stored
) -> tuple[list[_Item], _Rest]:
    planned = make_plan(module, job).all_linears()
    layers = {name: each for name, each in planned.items() if isinstance(each, nn.Module)}
    if any(isinstance(each, ExpertMap) for each in planned.values()):
        raise TersorError("target_bits does not choose among experts: give their bits by rules of a recipe")

    sizes = (job.layout or COMPRESSED_TENSORS).sizes
    assert sizes is not None  # `check_linear` takes no layout that packs nothing

    def size(shape: tuple[int, int], bits: int, group: int) -> int:
        grids = UniformGrids(bits, group, method.sym)  # groups of neighbours
        return sum(sizes(*shape, grids, stored.scale_dtype).values())

    judged = [probe_of(each, TOKENS) for each in samples[:JUDGED_ON]]
    wanted = [_checked(call(module, batch), n) for n, batch in enumerate(judged)]
    items = [_Item(names, [matrix_shape(layers[n]) for n in names]) for names in _together(module, layers, judged[0])]
    seen = {name for item in items for name in item.names}
    kinds = {kind_of(name) for name in seen}
    shapes = {name: matrix_shape(layers[name]) for name in layers if name not in seen and kind_of(name) in kinds}
    numbers = sum(rows * columns for rows, columns in shapes.values())
    rest = _Rest(
        list(shapes), numbers, sum(size(each, width_of(method.bits), method.group_size) for each in shapes.values())
    )
    tried = {item.names[0]: _candidates(item, method, job) for item in items}
    least = [
        min(sum(size(shape, bits, group) for shape in item.shapes) for bits, group in tried[item.names[0]])
        for item in items
    ]
    _check_target(job, sum(least) + rest.size, sum(item.numbers for item in items) + rest.numbers)
    work = Work(samples[:SOLVED_ON], lambda name: True, silent)
    done = 0
    for turn in turns({item.names[0]: layers[item.names[0]] for item in items}):
        hessians = input_hessians(module, {name: layers[name] for name in turn}, work)
        for item in (each for each in items if each.names[0] in turn):
            factor = factorize(hessians.pop(item.names[0]).float(), damp=method.damp, desc_act=method.desc_act)
            kept = {name: weight_matrix(layers[name]).clone() for name in item.names}
            for bits, group in tried[item.names[0]]:
                solver = replace(method, bits=bits, group_size=group)
                for name in item.names:
                    set_weight_matrix(layers[name], solver.solution(kept[name], factor, stored).dequantize())
                lost = sum(_lost(module, call(module, each), was) for each, was in zip(judged, wanted, strict=True))
                taken = sum(size(shape, bits, group) for shape in item.shapes)
                lost = lost if math.isfinite(lost) else math.inf  # an overflow or NaN is never chosen
                item.options.append(((bits, group), taken, lost / len(judged)))
            for name in item.names:
                set_weight_matrix(layers[name], kept[name])
            if not any(math.isfinite(lost) for *_, lost in item.options):
                raise NotFiniteError(
                    f"with {item.names[0]} compressed the model's output is not finite (NaN or Inf) at any number of bits; if "
                    f"the model overflows, use --dtype float32"
                )
            done += 1
            job.progress("measuring what bits are worth", done, len(items))
    return items, rest


def _checked(output: Any, number: int) -> Any:
    """The original's output. Raises NotFiniteError where it is not finite."""
    found = first_tensor(output)
    if found is not None and not bool(torch.isfinite(found).all()):
        raise NotFiniteError(
            f"the model's output is not finite (NaN or Inf) in calibration sample {number}; if it overflows {found.dtype}, use "
            "--dtype float32"
        )
    return output


def _check_target(job: Job, least: int, weights: int) -> None:
    """Raise TersorError where the target is too small. least: the bytes of the smallest choice."""
    assert job.target_bits is not None
    if least > int(job.target_bits * weights / 8):
        raise TersorError(
            f"target_bits={job.target_bits:g} is below the {8 * least / weights:.3f} bits a weight that the least choice takes"
        )


def _candidates(item: _Item, method: GPTQ, job: Job) -> list[tuple[int, int]]:
    """The bits and group sizes that all layers of an item can take. Raises TersorError where none fits."""
    found, why = [], TersorError("")
    for bits, group in dict.fromkeys([*((bits, method.group_size) for bits in BITS), *FINE]):
        try:
            for name, (rows, columns) in zip(item.names, item.shapes, strict=True):
                replace(method, bits=bits, group_size=group).check_linear(name, rows, columns, job.layout)
        except TersorError as error:
            why = error
            continue
        found.append((bits, group))
    if not found:
        raise why
    return found


def _together(module: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> list[list[str]]:
    """The layers that are called, in groups that read the same tensor."""
    groups: list[list[str]] = []
    inputs: list[Tensor] = []  # kept alive, so that no other tensor gets the same identity
    seen: set[str] = set()

    def note(name: str) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen or not args:
                return
            seen.add(name)
            place = next((n for n, each in enumerate(inputs) if each is args[0]), None)
            if place is None:
                inputs.append(args[0])
                groups.append([name])
            else:
                groups[place].append(name)

        return hook

    with ExitStack() as hooks:
        for name, each in layers.items():
            hooks.enter_context(each.register_forward_pre_hook(note(name)))
        call(module, batch)
    return groups


def _lost(model: nn.Module, output: Any, wanted: Any) -> float:
    mine, other = first_tensor(output), first_tensor(wanted)
    assert mine is not None
    assert other is not None
    mine, other = mine.float(), other.float()
    if predicts(model, wanted):
        p, q = other.log_softmax(-1), mine.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())
    return float((mine - other).square().mean() / other.square().mean().clamp(min=1e-30))


def _recipe(items: Sequence[_Item], rest: _Rest, method: GPTQ, job: Job) -> Recipe:
    """The method with the most frequent choice, and a rule for every layer with another."""
    assert job.target_bits is not None
    weights = sum(item.numbers for item in items) + rest.numbers
    finite = [[each for each in item.options if math.isfinite(each[-1])] for item in items]
    options = [[(size, lost) for _, size, lost in each] for each in finite]
    found = choose(options, int(job.target_bits * weights / 8) - rest.size)
    if found is None:
        _check_target(job, sum(min(size for size, _ in each) for each in options) + rest.size, weights)
    assert found is not None
    taken = sum(each[n][0] for each, n in zip(options, found, strict=True)) + rest.size
    counted: Counter[tuple[int, int]] = Counter()
    chosen: dict[str, tuple[Bits, int]] = dict.fromkeys(rest.names, (method.bits, method.group_size))
    if rest.numbers:
        counted[width_of(method.bits), method.group_size] += rest.numbers
    for item, each, n in zip(items, finite, found, strict=True):
        counted[each[n][0]] += item.numbers
        chosen |= dict.fromkeys(item.names, each[n][0])
    (bits, group), _ = counted.most_common(1)[0]
    shares = ", ".join(
        f"{count / weights:.0%} at {b} bits in groups of {g}" for (b, g), count in sorted(counted.items())
    )
    job.progress(f"{8 * taken / weights:.3f} bits a weight: {shares}", 0, 0)
    rules = [Rule(name, {"bits": b, "group_size": g}) for name, (b, g) in chosen.items() if (b, g) != (bits, group)]
    return Recipe(replace(method, bits=bits, group_size=group), tuple(rules))
