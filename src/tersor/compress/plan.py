"""Which linear maps of a model a job compresses, checked before anything is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tersor.calibrate.blocks import Unit, find_blocks
from tersor.calibrate.routing import check_routing
from tersor.calibrate.statistics import is_expert
from tersor.compress.recipe import Recipe
from tersor.compress.settings import Job
from tersor.errors import TersorError
from tersor.formats.layout import Layout
from tersor.formats.layouts import LAYOUTS
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import LinearMap, is_conv1d, linear_maps, matrix_shape
from tersor.layers.quantized_embedding import why_not_packed
from tersor.layers.routers import ROUTERS, router_maps
from tersor.methods.method import BlockMethod
from tersor.progress import Progress

# Layers that servers split along their inputs, by the names that transformers gives them.
ROW_PARALLEL = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|c_proj|dense|dense_4h_to_h|fc2|fc_out|w2|wo)(\.\d+)?$")


@dataclass(frozen=True)
class Plan:
    """What is compressed, and how."""

    blocks: list[Unit]  # in tree order
    linears: dict[str, dict[str, LinearMap]]  # the maps to compress in each block: {block: {full name: map}}
    methods: dict[str, BlockMethod]  # the method of each layer
    left: list[str]  # the linear layers that stay as they are

    def all_linears(self) -> dict[str, LinearMap]:
        return {name: module for each in self.linears.values() for name, module in each.items()}

    def by_method(self, block: str) -> dict[BlockMethod, list[str]]:
        """The layers of a block that each method takes, in tree order."""
        groups: dict[BlockMethod, list[str]] = {}
        for name in self.linears[block]:
            groups.setdefault(self.methods[name], []).append(name)
        return groups


def make_plan(model: nn.Module, job: Job) -> Plan:
    """All linear maps inside the repeated blocks, except routers, tied weights and the towers of multimodal generators. `head`
    adds the output head, `embeddings` the token embedding.

    Raises TersorError where a pattern matches nothing, nothing is left to compress, or the method refuses a layer.
    """
    recipe, layout = job.recipe, job.layout
    embedding = [_embedding(model, layout)] if job.embeddings else []
    everything: dict[str, LinearMap] = {**{unit.name: unit.module for unit in embedding}, **linear_maps(model)}
    blocks = [*embedding, *find_blocks(model), *([_head(model)] if job.head else [])]
    job.check_patterns(list(everything))
    tied, towers, routers = _tied_weights(model), () if job.include else _towers(model), router_maps(model)
    chosen: dict[str, dict[str, LinearMap]] = {}
    for block in blocks:
        found = {"": block.module} if block in embedding else linear_maps(block.module)
        inside = {".".join(filter(None, (block.name, n))): m for n, m in found.items()}
        chosen[block.name] = {
            name: module
            for name, module in inside.items()
            if not (ROUTERS.search(name) or name in routers)
            and not (isinstance(module, nn.Module) and id(module.weight) in tied)
            and not block.name.startswith(towers)
            and job.wants(name)
        }
    methods = {name: m for each in chosen.values() for name in each if (m := _method_for(recipe, name)) is not None}
    methods |= {unit.name: methods[unit.name].without_inputs() for unit in embedding if unit.name in methods}
    if layout is not None and any(unit.name in methods for unit in embedding):
        assert isinstance(recipe.method, BlockMethod)
        _check_one_grid([recipe.method, *methods.values()])
    plan = Plan(blocks, chosen, methods, [])
    _check_stacks(plan, everything)
    taken = plan.all_linears()
    if not taken:
        raise TersorError("there is no linear layer to compress in this model's blocks")
    for method in dict.fromkeys(methods.values()):
        if layout is not None and layout.name not in method.layouts:
            can = ", ".join(method.layouts)
            raise TersorError(f"method {method.name} cannot be stored as {layout.name}; it can as {can}")
    for block in blocks:
        if any(map(is_expert, chosen[block.name])):
            check_routing(block.name, block.module, job.routing)
    if job.routing.experts is not None and not any(map(is_expert, taken)):
        raise TersorError("experts does nothing: no layer that is compressed is an expert of a mixture; leave it out")
    for name, module in taken.items():
        methods[name].check_linear(name, *matrix_shape(module), layout)
        if layout is not None and not layout.conv1d and is_conv1d(module):
            raise TersorError(
                f"{name} is one of transformers' Conv1D layers, for which readers of {layout.name} draw random weights; "
                "use --format gptq"
            )
        check_split(name, *matrix_shape(module), methods[name], job.target_tp)
    return Plan(blocks, chosen, methods, [name for name in everything if name not in taken])


def _method_for(recipe: Recipe, layer: str) -> BlockMethod | None:
    """Raises TersorError where a rule names a method that cannot take single layers."""
    method = recipe.method_for(layer)
    if method is None or isinstance(method, BlockMethod):
        return method
    raise TersorError(f"method {method.name} works on the whole model; no rule can choose it for {layer}")


def _check_stacks(plan: Plan, everything: dict[str, LinearMap]) -> None:
    """Raise TersorError where only some of the experts in one parameter are chosen: they are compressed together."""
    taken = plan.all_linears()
    stacks = {n.rpartition(".")[0] for n, each in taken.items() if isinstance(each, ExpertMap)}
    for name, each in everything.items():
        if isinstance(each, ExpertMap) and name.rpartition(".")[0] in stacks and name not in taken:
            stack = name.rpartition(".")[0]
            raise TersorError(
                f"{name} is left out, but others of {stack} are not; include or exclude '{stack}.*' as a whole"
            )


def check_split(name: str, out_features: int, in_features: int, method: BlockMethod, devices: int) -> None:
    """Raise TersorError where a packed layer cannot be split over `devices` for tensor-parallel serving.

    Layers whose outputs are summed over the devices are split along their inputs, in whole groups; others along their
    outputs, in whole 32-bit words of packed zero points.
    """
    if devices == 1:
        return
    grids = method.quantization()
    group = grids.group_size if grids else -1
    if ROW_PARALLEL.search(name):
        unit = max(group, 32)
        if in_features % (devices * unit):
            raise TersorError(
                f"{name}: its {in_features} inputs do not split over {devices} devices in whole groups of {unit}; "
                f"use a smaller group size or --target-tp {_largest_divisor(in_features // unit, devices)}"
            )
    elif out_features % (devices * 32):
        raise TersorError(
            f"{name}: its {out_features} outputs do not split over {devices} devices in whole words of 32; "
            f"--target-tp {_largest_divisor(out_features // 32, devices)} would work"
        )


def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(min(limit, max(number, 1)), 0, -1) if number % n == 0)


def without(plan: Plan, names: set[str]) -> Plan:
    """The plan with these layers left as they are."""
    linears = {block: {n: m for n, m in each.items() if n not in names} for block, each in plan.linears.items()}
    return Plan(
        plan.blocks, linears, plan.methods, [*plan.left, *(name for name in plan.all_linears() if name in names)]
    )


def without_stacks(
    plan: Plan, stacked: Sequence[str], layout: Layout, *, include: Sequence[str], progress: Progress
) -> Plan:
    """The plan without experts that lie in one tensor: transformers finds no packed ones there and would draw them at random. One
    line tells the user.

    stacked: those experts. Raises TersorError where `include` asks for them, or nothing else is left to compress.
    """
    if not stacked:
        return plan
    reduced = without(plan, set(stacked))
    asked = any(fnmatchcase(name, pattern) for name in stacked for pattern in include)
    if asked or not reduced.all_linears():
        raise TersorError(
            f"{stacked[0]} lies in one tensor with the other experts, and readers of {layout.name}, which do not find it "
            f"{'alone' if layout.is_plain else 'packed'}, draw it at random; {_instead(layout)}"
        )
    if layout.is_plain:
        why = f"one tensor holds all of a stack; {_instead(layout)}"
    else:
        why = f"readers of {layout.name} find no packed ones in one stack; --format gptq packs them"
    progress(f"{len(stacked)} experts stay as they are: {why}", 0, 0)
    return reduced


def _instead(layout: Layout) -> str:
    return "compress the model as a module in memory" if layout.is_plain else "use --format gptq"


def _head(model: nn.Module) -> Unit:
    """The output head as a block of its own. Raises TersorError where there is none, or it shares its weight."""
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    name = next((n for n, each in model.named_modules() if each is found), None) if found is not None else None
    if name is None or not linear_maps(found):
        raise TersorError("the model has no output head that could be quantized")
    if id(found.weight) in _tied_weights(model):
        raise TersorError(f"the head {name} is tied to the embedding and stays as it is")
    return Unit(name, found, True)


def _check_one_grid(methods: Sequence[BlockMethod]) -> None:
    """Raise TersorError where the methods have several kinds of grids. It is called for a checkpoint with a packed embedding,
    because transformers unpacks such a checkpoint by one kind of grid."""
    kinds = {(grids.bits, grids.group_size, grids.sym) for method in methods if (grids := method.quantization())}
    if len(kinds) > 1:
        found = "; ".join(f"bits {bits}, group size {group}, sym {sym}" for bits, group, sym in sorted(kinds, key=str))
        raise TersorError(
            f"with --embeddings all layers of a checkpoint need the same grids, as transformers reads them with one; the rules "
            f"ask for {found}"
        )


def _embedding(model: nn.Module, layout: Layout | None) -> Unit:
    """The token embedding as a block of its own, with one map. Raises TersorError where it cannot be packed."""
    try:
        found: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except (
        AttributeError,
        NotImplementedError,
    ):  # transformers raises these for models whose embedding it does not know
        found = None
    names = [name for name, each in model.named_modules(remove_duplicate=False) if each is found]
    if not names or not isinstance(found, nn.Embedding):
        raise TersorError("the model has no token embedding that could be quantized; leave --embeddings out")
    if len(names) > 1 or id(found.weight) in _tied_weights(model):
        raise TersorError(
            f"the embedding {names[0]} is tied to another weight and stays as it is; leave --embeddings out"
        )
    if reason := why_not_packed(found):
        raise TersorError(f"the embedding {names[0]} {reason}; leave --embeddings out")
    if layout is not None and not layout.embeddings:
        raise TersorError(
            f"no other reader of the format {layout.name} knows packed embeddings; use --format compressed-tensors, or leave "
            "--embeddings out"
        )
    return Unit(names[0], found, True)


def _towers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the encoders that feed a text generator with images or sound. They stay as they are unless `include` is
    given."""
    generates = getattr(model, "can_generate", lambda: False)()
    if not generates or getattr(model, "main_input_name", None) != "input_ids":
        return ()
    inputs = {name: getattr(each, "main_input_name", "input_ids") for name, each in model.named_modules() if name}
    return tuple(f"{name}." for name, kind in inputs.items() if kind != "input_ids")


def _tied_weights(model: nn.Module) -> set[int]:
    """Weights that several modules share (an output head tied to the embedding): quantizing one would change the others."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def with_fitting_layout(model: nn.Module, job: Job) -> Job:
    """The job with compressed-tensors for its layout where it names none and the usual one does not hold every layer. Conv1D
    layers keep the usual one: readers of compressed-tensors draw them at random."""
    if job.layout is None or not job.may_pad:
        return job
    taken = make_plan(model, replace(job, layout=None)).all_linears()
    if any(map(is_conv1d, taken.values())):
        return job
    for name, module in taken.items():
        found = job.layout.misfit(*matrix_shape(module))
        if isinstance(module, nn.Embedding) and not job.layout.embeddings:
            found = "an embedding's rows"
        if found:
            job.progress(f"format compressed-tensors: {name} has {found}, which {job.layout.name} does not hold", 0, 0)
            return replace(job, layout=LAYOUTS["compressed-tensors"], may_pad=False)
    return job
