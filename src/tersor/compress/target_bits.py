"""Bits where they pay: each layer's number of bits and group size, from what it does to the model's predictions.

Every candidate (2, 3, 4 and 8 bits in groups as asked, 2 and 3 bits also in groups of 32) is measured for each layer alone: GPTQ
solves it on the samples, it takes the layer's place, and what the whole model says is compared with what the original says (KL
divergence where there are `logits`, else the relative squared error). Layers that read the same input (q, k and v; gate and up)
are taken together, as servers fuse them. The choice is the one with the least sum of divergences within the bytes that the
target allows, scales and zero points included: found exactly (`knapsack.py`). It becomes the rules of a recipe, and the job goes
on with it. The whole model is in memory meanwhile.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor, probe_of, without_cache, without_target
from tersor.calibrate.parallel import processes
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.compress.knapsack import choose
from tersor.compress.layout_choice import with_fitting_layout
from tersor.compress.plan import make_plan
from tersor.compress.recipe import Recipe, Rule
from tersor.compress.samples import read_samples, samples_by_path
from tersor.compress.settings import Job
from tersor.errors import TersorError
from tersor.formats.grid import Stored
from tersor.formats.layout import Layout
from tersor.formats.packing import packed_size
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import matrix_shape, set_weight_matrix, weight_matrix
from tersor.methods.method import Work
from tersor.methods.structure.greenformers import input_hessians, turns
from tersor.methods.weights.gptq import GPTQ
from tersor.methods.weights.gptq_solver import factorize

BITS = (2, 3, 4, 8)
FINE = ((2, 32), (3, 32))  # bits and group size that are tried too
SOLVED_ON, JUDGED_ON, TOKENS = 16, 8, 256  # samples for the Hessians; samples and tokens of each to compare outputs on


def with_chosen_bits(model: str | nn.Module, job: Job) -> Job:
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
        module, stored = copy.deepcopy(model).eval(), next(model.parameters()).dtype
    else:
        checkpoint = open_checkpoint(model, allow_pickle=job.allow_pickle)
        if "quantization_config" in checkpoint.config or checkpoint.gguf is not None:
            return job  # which will be told what is wrong
        dtype, stored = compute_dtype(checkpoint, job.place, job.dtype), torch_dtype(checkpoint.config)
        module = LazyModel(checkpoint, dtype=dtype, device=job.place).load_all().to(job.place).eval()
        tokenizer = job.tokenizer or load_tokenizer(checkpoint.directory)
        job = replace(job, tokenizer=tokenizer)
    fitting = with_fitting_layout(module, replace(job, progress=lambda what, done, total: None))
    given = job.calibration if isinstance(model, nn.Module) else samples_by_path(checkpoint, job)
    first = next(module.parameters())
    module.requires_grad_(False)
    with torch.no_grad(), without_cache(module):
        samples = [
            without_target(each) for each in read_samples(job, given, module, job.tokenizer, first.device, first.dtype)
        ]
        measured = _measure(module, fitting, method, samples, Stored(_scale_dtype(fitting, stored), _min_zero(fitting)))
    recipe = _recipe(measured, method, job)
    return replace(job, recipe=replace(recipe, rules=(*recipe.rules, *job.recipe.rules)))


def _scale_dtype(job: Job, stored: torch.dtype) -> torch.dtype:
    return (job.layout.scale_dtype if job.layout else None) or stored


def _min_zero(job: Job) -> int:
    return job.layout.min_zero if job.layout else 0


class _Item:
    """Layers that are chosen together. options: (bits, group size), its bytes and its divergence."""

    def __init__(self, names: list[str], shapes: list[tuple[int, int]]) -> None:
        self.names, self.shapes = names, shapes
        self.options: list[tuple[tuple[int, int], int, float]] = []

    @property
    def numbers(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


def _measure(module: nn.Module, job: Job, method: GPTQ, samples: list[Batch], stored: Stored) -> list[_Item]:
    planned = make_plan(module, job).all_linears()
    layers = {name: each for name, each in planned.items() if isinstance(each, nn.Module)}
    if any(isinstance(each, ExpertMap) for each in planned.values()):
        raise TersorError("target_bits does not choose among experts: give their bits by rules of a recipe")
    judged = [probe_of(each, TOKENS) for each in samples[:JUDGED_ON]]
    wanted = [call(module, batch) for batch in judged]
    work = Work(samples[:SOLVED_ON], lambda name: True, lambda what, done, total: None)
    items = [_Item(names, [matrix_shape(layers[n]) for n in names]) for names in _together(module, layers, judged[0])]
    done = 0
    for turn in turns({item.names[0]: layers[item.names[0]] for item in items}):
        hessians = input_hessians(module, {name: layers[name] for name in turn}, work)
        for item in (each for each in items if each.names[0] in turn):
            factor = factorize(hessians.pop(item.names[0]).float(), damp=method.damp, desc_act=method.desc_act)
            kept = {name: weight_matrix(layers[name]).clone() for name in item.names}
            for bits, group in _candidates(item, method, job):
                tried = replace(method, bits=bits, group_size=group)
                for name in item.names:
                    set_weight_matrix(layers[name], tried.solution(kept[name], factor, stored).dequantize())
                lost = sum(_lost(call(module, each), was) for each, was in zip(judged, wanted, strict=True))
                size = sum(
                    bytes_of(*shape, bits, group, job.layout, stored.scale_dtype, sym=method.sym)
                    for shape in item.shapes
                )
                item.options.append(((bits, group), size, lost / len(judged)))
            for name in item.names:
                set_weight_matrix(layers[name], kept[name])
            done += 1
            job.progress("measuring what bits are worth", done, len(items))
    return items


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
    """The layers that are called, those that read one and the same tensor together."""
    groups: list[list[str]] = []
    inputs: list[Tensor] = []  # held, so that no other tensor gets the identity of one
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

    handles = [each.register_forward_pre_hook(note(name)) for name, each in layers.items()]
    try:
        call(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return groups


def _lost(output: Any, wanted: Any) -> float:
    mine, other = first_tensor(output), first_tensor(wanted)
    assert mine is not None
    assert other is not None
    mine, other = mine.float(), other.float()
    if isinstance(getattr(wanted, "logits", None), Tensor):
        p, q = other.log_softmax(-1), mine.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())
    return float((mine - other).square().mean() / other.square().mean().clamp(min=1e-30))


def _recipe(items: Sequence[_Item], method: GPTQ, job: Job) -> Recipe:
    """The method with the commonest choice, and a rule for every layer that has another."""
    assert job.target_bits is not None
    weights = sum(item.numbers for item in items)
    options = [[(size, lost) for _, size, lost in item.options] for item in items]
    found = choose(options, int(job.target_bits * weights / 8))
    if found is None:
        least = 8 * sum(min(size for size, _ in each) for each in options) / weights
        raise TersorError(
            f"target_bits={job.target_bits:g} is below the {least:.3f} bits a weight that the least choice takes"
        )
    chosen = {name: item.options[n][0] for item, n in zip(items, found, strict=True) for name in item.names}
    counted: Counter[tuple[int, int]] = Counter()
    for item, n in zip(items, found, strict=True):
        counted[item.options[n][0]] += item.numbers
    (bits, group), _ = counted.most_common(1)[0]
    shares = ", ".join(
        f"{count / weights:.0%} at {b} bits in groups of {g}" for (b, g), count in sorted(counted.items())
    )
    taken = 8 * sum(each[n][0] for each, n in zip(options, found, strict=True)) / weights
    job.progress(f"{taken:.3f} bits a weight: {shares}", 0, 0)
    rules = [Rule(name, {"bits": b, "group_size": g}) for name, (b, g) in chosen.items() if (b, g) != (bits, group)]
    return Recipe(replace(method, bits=bits, group_size=group), tuple(rules))


def bytes_of(
    rows: int, columns: int, bits: int, group_size: int, layout: Layout | None, scale_dtype: torch.dtype, *, sym: bool
) -> int:
    """What one layer [rows, columns] of natural groups takes on disk, its steps in scale_dtype."""
    groups = -(-columns // (columns if group_size == -1 else group_size))
    codes, zeros = 4 * packed_size(columns, bits) * rows, 4 * groups * packed_size(rows, bits)
    steps = scale_dtype.itemsize * groups * rows
    if layout is not None and "qzeros" in layout.suffixes:  # as gptq writes them, with the group of each input
        return codes + steps + zeros + 4 * columns
    return codes + steps + 16 + (0 if sym else zeros)
