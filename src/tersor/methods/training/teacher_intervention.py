"""Teacher Intervention: quantization-aware training of a transformer at two bits (Kim et al., EACL 2023, arXiv 2302.11812).

What it is for: weights so coarse (ternary, 2 bits) that rounding after training, even GPTQ, destroys the model. The quantized
model is trained to compute what the original computes, from inputs alone, without labels. The saved file holds packed weights.
The arithmetic is simulated in floating point, so nothing runs faster. From 4 bits on, GPTQ (`tersor quantize`) is quicker and
good enough.

    tersor compress teacher-intervention MODEL --calibration text.txt --samples 512 --seq-len 64 \\
        --steps 600 --lr 1e-4 --state-dir run --out small           # Ctrl-C, and the same command goes on

    result = tersor.compress(model, TeacherIntervention(steps=600, lr=1e-4), calibration=texts)

Every forward pass rounds (formats/clipped_grid.py). Weights become a sign(w), with one a per layer and one per row of the word
embedding, or with `w_bits=2..8` numbers on min-max grids. The inputs of linear layers and of both products of the attention
are rounded to 8 bits, with a scale fitted to each batch. Gradients go straight through. In the first `intervention_steps` the
student's layers work with the teacher's signals, so that errors do not pile up from layer to layer:

    output    the output of the attention's last layer, before residual and norm
    context   map · v
    map       softmax(q kᵀ / √d), which is then rounded as the student's own would be
    gradual   output for a sixth of these steps, context for the next sixth, then map (the paper's)
    inverted  map for a third, context for a third, output for a third
    stochastic  one of the three at random each step
    none      plain quantization-aware training

Meanwhile hidden states get no gradient through queries and keys, and with context or output none through values. The loss is
always:

    soft cross entropy of the logits + Σ MSE(hidden states; embedding and each block) + Σ MSE(output of the norm after each
    attention) + Σ MSE(scores before the softmax; those of at most -100, masked ones, count as 0)

The optimizer is BertAdam (train/bert_adam.py). Each phase has a warm-up over its first tenth and a linear fall to 0. Defaults
are the published ones, except `steps` (there 3 epochs of GLUE) and `batch_size` (there 16 or 32). Few steps need a larger `lr`.

Attentions are found by running the model (methods/training/signals.py). Quantized: linear layers in blocks and those outside
that do not make the logits (BERT's pooler), the table of the input embeddings unless it is tied. Not quantized: convolutions,
position embeddings, biases, norms. What differs, or was not published: models other than BERT; a model without logits has the
MSE of all that it returns in the place of the cross entropy; a language model's cross entropy is the mean over tokens; min-max
grids for weights; the times of `inverted`; a dropout on the map acts on the teacher's as on the student's. In the published code
2.5 limits every weight and activation; where activations are larger (decoders), give `clip=0`.

Origin: MarsJacobs/ti-kd-qat (no licence file; from TernaryBERT, Apache-2.0). Written from a description.

Proven: the golden cases (quantizers; logits, losses and gradients without intervention and with each) at 5e-6; a student that is
its teacher keeps its logits under every intervention; saved and loaded equal; an interrupted run goes on to the same bits.
Measured on MiniLM, demo-vit and demo over 480 steps: plain training (intervention=none) is as fast
(benchmarks/results/quantization_aware.md), so the published speed-up is not seen there. Not proven: GLUE scores.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.calibrate.batches import call, without_target
from tersor.calibrate.blocks import find_blocks
from tersor.calibrate.draws import drawing
from tersor.errors import TersorError
from tersor.formats.clipped_grid import Weights
from tersor.layers.dynamic_map import UNROUNDED
from tersor.layers.dynamic_products import DynamicProducts
from tersor.layers.linear_map import computes_its_own, embeddings, linear_maps
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.methods.training.batches import Drawn
from tersor.methods.training.signals import Intervention, Parts, Places, Signals, find_places, parts_of, run
from tersor.methods.training.trained import TrainedMap, TrainedRows
from tersor.train.bert_adam import BertAdam, bert_adam, warm_and_linear
from tersor.train.checkpoint import load_run, save_run

SCHEDULES = ("gradual", "inverted", "stochastic", "output", "context", "map", "none")
KINDS: tuple[Intervention, ...] = ("output", "context", "map")
MASKED = -100.0  # scores at or below it belong to positions that a mask hides
SAVE_EVERY = 100  # steps, with `state_dir`
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class TrainedPart(Report):
    """One row: a layer, with its bits (as in W2A8) and ‖Ŵ - W‖² / ‖W‖² of the trained weight; or a phase of the training, with
    the losses at its start and end."""

    bits: str
    error: float
    note: str = ""


@register
@dataclass(frozen=True)
class TeacherIntervention(ModelMethod):
    """Train a model with ternary or few-bit weights to compute what the original does, at first on the original's signals."""

    name: ClassVar[str] = "teacher-intervention"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-qat",
        "inference/quantization-binary",
        "inference/distillation-logits",
        "inference/distillation-attention",
        "practical/quantization",
        "practical/distillation",
    )

    w_bits: Weights = option(
        "ternary",
        "ternary, or bits a weight, 2 to 8",
        check=lambda v: v == "ternary" or (not isinstance(v, bool) and v in range(2, 9)),
        allowed="ternary, or 2 to 8",
        word=True,
    )
    a_bits: int = option(
        8,
        "bits an activation; 32: not rounded",
        check=lambda v: v in range(2, 9) or v == UNROUNDED,
        allowed="2 to 8, or 32",
    )
    per_output: bool = option(False, "one grid for each output of a layer, not one for the layer")
    clip: float = option(2.5, "largest magnitude of weights and activations; 0: any", least=0)
    intervention: str = option("gradual", "what the teacher gives at first: " + ", ".join(SCHEDULES), choices=SCHEDULES)
    intervention_steps: int = option(60, "steps with it", least=0)
    steps: int = option(600, "steps in all", least=1)
    batch_size: int = option(16, "samples a step", least=1)
    lr: float = option(2e-5, "learning rate of BertAdam", above=0)
    dropout: bool = option(True, "train with the dropout that the model's config has (models of transformers)")
    order_seed: int = option(0, "seed of the order of samples, dropout and `stochastic`", least=0)
    state_dir: str = option("", "folder for the state of the training; the same command goes on from it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervention != "none" and self.intervention_steps > self.steps:
            raise TersorError(
                f"intervention_steps={self.intervention_steps} are more than all steps={self.steps}; lower it or raise steps"
            )

    @property
    def trains(self) -> bool:
        return True

    @property
    def first_phase(self) -> int:
        """Steps with an intervention."""
        return 0 if self.intervention == "none" else self.intervention_steps

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        data = Drawn(work.samples, self.batch_size, self.order_seed)
        probe = without_target(dict(work.samples[0]))
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        teacher = copy.deepcopy(model).float().eval().requires_grad_(False)
        student = prepare(model.float(), self, data.cast(probe), work.wanted)
        with torch.enable_grad():
            rows = train(student, teacher, data, self, work)
        for report in [*freeze(student, self, dtypes), *rows]:
            work.report(report)
        return student.model.eval().requires_grad_(False)

    def kind(self, step: int) -> Intervention:
        """Which signals a step (from 0) replaces; "" in the second phase."""
        total = self.first_phase
        if step >= total:
            return ""
        if self.intervention == "gradual":
            return "output" if step < total / 6 else "context" if step < total / 3 else "map"
        if self.intervention == "inverted":
            return "map" if step < total / 3 else "context" if step < 2 * total / 3 else "output"
        if self.intervention == "stochastic":
            chance = torch.Generator().manual_seed(self.order_seed * 1_000_003 + step)
            return KINDS[int(torch.randint(3, (1,), generator=chance))]
        return cast(Intervention, self.intervention)


@dataclass
class Student:
    """A model whose layers round while they are trained."""

    model: nn.Module
    parts: Parts
    places: Places
    layers: dict[str, TrainedMap | TrainedRows]  # those that round, by their names in the original
    left: dict[str, str]


def prepare(
    model: nn.Module, method: TeacherIntervention, probe: dict[str, Any], wanted: Callable[[str], bool]
) -> Student:
    """Replace layers by rounding ones, in place. model: in float32. probe: inputs for it."""
    try:
        places, why = find_places(model, probe), ""
    except TersorError as error:
        if method.first_phase:
            raise
        places, why = Places([unit.name for unit in find_blocks(model)], []), str(error)
    chosen, left = layers_to_round(model, probe, wanted)
    if why:
        left["attention"] = why.partition(";")[0]
    layers: dict[str, TrainedMap | TrainedRows] = {}
    for name, module in chosen.items():
        if isinstance(module, nn.Embedding):
            layers[name] = TrainedRows(module, method.w_bits, clip=method.clip)
        else:
            layers[name] = TrainedMap(
                module, method.w_bits, per_output=method.per_output, a_bits=method.a_bits, clip=method.clip
            )
        model.set_submodule(name, layers[name])
    if not layers:
        raise TersorError(f"{type(model).__name__} has no layer to quantize: {len(left)} were left as they are")
    parts = parts_of(model, places)
    if method.a_bits != UNROUNDED:
        sites = {site for place in places.attentions for site in place.sites if wanted(site)}
        for site in sites:
            if any(other.startswith(f"{site}.") for other in sites):
                left[site] = "multiplies activations around a module that does so too"
                continue
            model.set_submodule(site, DynamicProducts(model.get_submodule(site), bits=method.a_bits, clip=method.clip))
    model.requires_grad_(True)
    return Student(model, parts, places, layers, left)


@torch.no_grad()
def layers_to_round(
    model: nn.Module, probe: dict[str, Any], wanted: Callable[[str], bool]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to quantize, by name; and those that are left as they are, each with the reason."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    blocks = find_blocks(model)
    inside = {id(module) for unit in blocks for module in unit.module.modules()}
    found, left = _candidates(model, wanted, uses)
    widths: dict[str, int] = {}  # of the outputs of layers outside the blocks
    late: set[str] = set()  # those that ran after the first block
    looked_up: set[str] = set()  # tables in which the tokens of input_ids were looked up
    started: list[bool] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(module, nn.Embedding):
                ids = probe.get("input_ids")
                if isinstance(ids, Tensor) and args and torch.equal(args[0], ids):
                    looked_up.add(name)
            else:
                widths[name] = result.shape[-1]
                if started:
                    late.add(name)

        return hook

    with ExitStack() as hooks:
        for name, module in found.items():
            hooks.enter_context(module.register_forward_hook(note(name)))
        hooks.enter_context(blocks[0].module.register_forward_pre_hook(lambda *_: started.append(True)))
        output = call(model, probe)
    logits = logits_of(output)
    chosen: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, nn.Embedding):
            if name in looked_up:
                chosen[name] = module
        elif id(module) in inside:
            chosen[name] = module
        elif name not in widths:
            left[name] = "no sample reaches it"
        elif name not in late:
            left[name] = "it reads the model's input"
        elif logits is not None and widths[name] == logits.shape[-1]:
            left[name] = "it makes the logits"
        else:
            chosen[name] = module
    return chosen, left


def _candidates(
    model: nn.Module, wanted: Callable[[str], bool], uses: Counter[int]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in {**linear_maps(model), **embeddings(model)}.items():
        if not wanted(name):
            continue
        if not isinstance(module, nn.Module):
            left[name] = "an expert of a stack"
        elif isinstance(module, nn.Conv2d):
            left[name] = "a convolution"
        elif computes_its_own(module):
            left[name] = f"{type(module).__name__} computes in a way of its own"
        elif uses[id(module.weight)] > 1:
            left[name] = "its weight is used elsewhere too"
        else:
            found[name] = module
    return found, left


def logits_of(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def losses(student: Signals, teacher: Signals) -> Losses:
    """The losses output (cross entropy of logits), hidden, attended and scores, and their sum total. Targets are the
    teacher's."""
    zero = student.hidden[0].new_zeros(()) if student.hidden else torch.zeros(())

    def apart(mine: list[Tensor], wanted: list[Tensor]) -> Tensor:
        return sum((F.mse_loss(a, b.detach()) for a, b in zip(mine, wanted, strict=True)), zero)

    def shown(scores: list[Tensor]) -> list[Tensor]:
        return [each.masked_fill(each <= MASKED, 0.0) for each in scores]

    found = {
        "output": output_loss(student.output, teacher.output),
        "hidden": apart(student.hidden, teacher.hidden),
        "attended": apart(student.attended, teacher.attended),
        "scores": apart(shown(student.scores), shown(teacher.scores)),
    }
    return {**found, "total": sum(found.values(), zero)}


def output_loss(student: Any, teacher: Any) -> Tensor:
    """Soft cross entropy of logits; MSE where they are a single number. Without logits, the sum of the MSE of all tensors."""
    mine, wanted = logits_of(student), logits_of(teacher)
    if mine is None or wanted is None:
        pairs = list(zip(_tensors(student), _tensors(teacher), strict=True))
        return torch.stack([F.mse_loss(a, b.detach()) for a, b in pairs]).sum()
    if wanted.shape[-1] == 1:
        return F.mse_loss(mine, wanted.detach())
    return -(wanted.detach().softmax(-1) * mine.log_softmax(-1)).sum(-1).mean()


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if hasattr(output, "values") else output
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


def train(
    student: Student,
    teacher: nn.Module,
    data: Drawn,
    method: TeacherIntervention,
    work: Work,
    watch: Callable[[int], None] = lambda step: None,
) -> list[TrainedPart]:
    """Both phases. watch(steps done) is called after every step. Returns a row for each phase."""
    own = parts_of(teacher, student.places)
    done, optimizer = 0, bert_adam(student.model, method.lr)
    settings = {**{k: v for k, v in method.options().items() if k != "state_dir"}, "samples": len(data.samples)}
    folder = Path(method.state_dir) if method.state_dir else None
    if folder is not None:
        kept = load_run(folder, {"model": student.model, "optimizer": optimizer}, settings, _device(student.model))
        done = int(kept.get("step", 0))
    rows: list[TrainedPart] = []
    first = last = math.nan
    started = done
    # Training mode only adds dropout to models of transformers; it may change the outputs of ours.
    student.model.train(method.dropout and hasattr(getattr(student.model, "config", None), "model_type"))

    def save() -> None:
        if folder is not None:
            run = {"step": done, "best": math.inf, "best_step": 0, "since_best": 0, "validation": {}}
            save_run(folder, run, {"model": student.model, "optimizer": optimizer}, settings)

    try:
        for step in range(done, method.steps):
            phase = (0, method.first_phase) if step < method.first_phase else (method.first_phase, method.steps)
            if step == method.first_phase and step:
                if step > started:
                    rows.append(_phase(method.intervention, started, step, first, last))
                first, started, optimizer = math.nan, step, bert_adam(student.model, method.lr)
            last = train_step(student, own, data.batch(step), method, optimizer, step, phase)
            first = last if math.isnan(first) else first
            done = step + 1
            if not math.isfinite(last):
                raise TersorError(f"the loss is {last} at step {done}; a lower lr may help")
            work.progress(f"training, loss {last:.4g}", done, method.steps)
            watch(done)
            if done % SAVE_EVERY == 0 or done == method.steps:
                save()
    except KeyboardInterrupt:
        if optimizer.whole:  # else the weights are half changed: keep what was saved last
            done = started + optimizer.taken
            save()
        raise
    if done > started:
        rows.append(
            _phase("training" if started >= method.first_phase else method.intervention, started, done, first, last)
        )
    return rows


def train_step(
    student: Student,
    teacher: Parts,
    batch: dict[str, Any],
    method: TeacherIntervention,
    optimizer: BertAdam,
    step: int,
    phase: tuple[int, int],
) -> float:
    """One step of BertAdam. Returns the total loss before it. phase: the phase's first step, and the one after its last."""
    kind = method.kind(step)
    for group in optimizer.param_groups:
        group["lr"] = method.lr * warm_and_linear(step - phase[0], phase[1] - phase[0])
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        wanted = run(teacher, batch)
    with drawing(method.order_seed * 1_000_003 + step) if method.dropout else nullcontext():
        found = run(student.parts, batch, kind=kind, teacher=wanted)
    total = losses(found, wanted)["total"]
    torch.autograd.backward(total)
    optimizer.step()
    return float(total.detach())


def _phase(name: str, first: int, after: int, before: float, last: float) -> TrainedPart:
    return TrainedPart(f"({name})", "", math.nan, f"steps {first + 1} to {after}: loss {before:.4g} to {last:.4g}")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def freeze(student: Student, method: TeacherIntervention, dtypes: dict[str, torch.dtype]) -> list[TrainedPart]:
    """Replace the trained layers by packed ones, and put all else back into its dtype. Returns a row for each layer."""
    names = {id(module): name for name, module in student.model.named_modules()}
    rows = []
    for name, layer in student.layers.items():
        stored = dtypes[f"{name}.weight"]
        bits = "W2" if method.w_bits == "ternary" else f"W{method.w_bits}"
        a_bits = "" if isinstance(layer, TrainedRows) or method.a_bits == UNROUNDED else f"A{method.a_bits}"
        rows.append(TrainedPart(name, bits + a_bits, layer.error()))
        student.model.set_submodule(names[id(layer)], layer.freeze(stored))
    stored = Counter(dtypes.values()).most_common(1)[0][0]
    for parameter in student.model.parameters():
        parameter.data = parameter.data.to(stored)
    for name, why in student.left.items():
        rows.append(TrainedPart(name, "", 0.0, f"left as it is: {why}"))
    return rows
