"""NViT: global structural pruning of a ViT until it is as fast as asked (Yang et al., CVPR 2023, arXiv 2110.04869).

    tersor compress nvit demo-vit --latency-target 0.7 --calibration cifar10_train_512.npz --samples 512 \\
        --finetune-steps 100 --out pruned
    tersor eval pruned --images cifar10_test_1000.npz

Five kinds of units compete in one list: channels of the embedding, heads, query/key channels, value channels (one index in all
heads of a block), hidden units of the MLPs. A unit's value (nvit_saliency.py) is the squared first-order change of the loss,
minus the time that a unit of its kind costs. Every `prune_interval` batches, the groups of units with the least value in the
whole model are set to zero; in between, AdamW trains the rest. Pruning stops when the latency, estimated from a table, has fallen
to `latency_target` of the unpruned model's. Then the zeros are taken out: the result is the model `nvit` (models/vision/nvit.py),
which computes what the zeroed one did.

The table is measured on the device at the start (blocks of a grid of widths, interpolated), or read from a file
(`nvit_latency.LatencyTable.save`). It is scaled so that a full block takes 0.0808 s, as in the published table. The published
`latency_weight` is 5e-4, with a loss that is multiplied by 1e5. With our loss it alone would decide which units go, so the
default is 2e-5 (benchmarks/results/pruning.md has both).

Loss: cross entropy with the labels of the calibration images (`target`), or with the unpruned model's decision where they
have none, plus `kd_weight` times the KL divergence from the unpruned model's prediction. Images are mirrored and shifted at
random. `finetune_steps` more steps of the same loss follow after the pruning, the rate falling to 0.

What differs from the published recipe, which trains for weeks of GPU time: the weight of the distillation (1e5 there, for a
loss that is not normalised); no CNN teacher; both heads of DeiT are trained by their mean; by default far fewer steps (there
100 batches of 512 images for each 32 units). The published average of the embedding's sums is over 12 blocks; here it is over
as many as there are. A few hundred images are no training set; benchmarks/results/pruning.md shows what they do on demo-vit.

It takes ViT and DeiT, with or without a distillation token; training is in float32.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor import models
from tersor.calibrate.images import augmented
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.methods.structure import nvit_saliency as units
from tersor.methods.structure.nvit_latency import LatencyTable, measure_table, read_table
from tersor.models.loading import load_state


@dataclass(frozen=True)
class PrunedBlock(Report):
    """One block."""

    widths: list[int]  # what is left; the embedding's width is the same in all blocks

    def row(self) -> dict[str, Any]:
        return {"name": self.name, **dict(zip(("embedding", "heads", "qk", "v", "mlp"), self.widths, strict=True))}


@register
@dataclass(frozen=True)
class NViTPruning(ModelMethod):
    """Prune channels, heads and hidden units of a ViT together, by what they matter and what they cost."""

    name: ClassVar[str] = "nvit"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-joint",
        "inference/pruning-heads",
        "inference/pruning-neurons",
        "inference/nas-hardware",
        "practical/pruning",
        "practical/distillation",
    )

    latency_target: float = option(0.7, "share of the unpruned latency to reach", above=0, below=1)
    latency_table: str = option("", "file with a latency table (JSON); without one it is measured on this device")
    latency_weight: float = option(2e-5, "weight of a unit's latency against its worth", least=0)
    prune_per_step: int = option(128, "units that a pruning step aims at", least=16)
    prune_interval: int = option(2, "batches between pruning steps", least=1)
    fixed: str = option(
        "",
        "kinds that are not pruned, of emb,head,qk,v,mlp",
        check=lambda v: all(kind in units.KINDS for kind in _words(v)) and len(set(_words(v))) < len(units.KINDS),
        allowed="some, not all, of emb,head,qk,v,mlp with commas between",
    )
    finetune_steps: int = option(0, "training steps after the pruning", least=0)
    batch_size: int = option(32, "images a step", least=1)
    lr: float = option(1e-4, "learning rate of AdamW", least=0)
    kd_weight: float = option(1.0, "weight of the distillation from the unpruned model", least=0)

    @property
    def trains(self) -> bool:
        return True

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        if getattr(type(model), "system", None) != "vit":
            raise TersorError(f"{type(model).__name__} is no ViT: pruning takes ViT and DeiT (demo-vit, vit_*, deit_*)")
        if not all(work.wanted(name) for name in linear_maps(model)):
            raise TersorError("units run through all layers, so none can be left out; --fixed names kinds that stay")
        teacher = copy.deepcopy(model).float().eval().requires_grad_(False)
        student = full_width(teacher)
        data = Data(work, teacher, self)
        table = self._table(student, work)
        gates = self._prune(student, data, table, work)
        pruned = dense(student, gates)
        if self.finetune_steps:
            train(pruned, data, self, work)
        batch = data.images[: self.batch_size]
        before, after = (1000 * seconds_of(each, batch) for each in (teacher, pruned))
        work.progress(
            f"latency measured on {len(batch)} images: {before:.1f} ms -> {after:.1f} ms ({after / before:.0%})", 0, 0
        )
        for n, widths in enumerate(units.widths_of(gates)):
            work.report(PrunedBlock(f"blocks.{n}", widths))
        return pruned.to(next(model.parameters()).dtype)

    def _table(self, student: Any, work: Work) -> LatencyTable:
        if self.latency_table:
            return read_table(self.latency_table)
        return measure_table(student.config, student.pos_embed.device, work.progress)

    def _prune(self, student: Any, data: Data, table: LatencyTable, work: Work) -> units.Gates:
        gates, fixed = units.open_gates(student), _words(self.fixed)
        full = units.latency(gates, table)
        self._check_target(gates, table, full)
        optimizer = torch.optim.AdamW(student.parameters(), lr=self.lr)
        criteria: list[Tensor] | None = None
        groups = [math.ceil(gate.numel() / units.GROUP[kind]) for kind, gate in _with_kinds(gates) if kind not in fixed]
        most, steps, share = sum(groups) * units.GROUP_OPTION, 0, 1.0  # in the end the threshold reaches every group
        started = time.perf_counter()
        while share > self.latency_target:
            if (steps - 1) * self.prune_per_step > most:
                raise TersorError(f"latency_target={self.latency_target}: nothing is left to prune at {share:.2f}")
            total: list[Tensor] | None = None
            for _ in range(self.prune_interval):
                optimizer.zero_grad()
                torch.autograd.backward(data.loss(student))
                new = units.criteria_of(student, fixed)
                total = new if total is None else [a + b for a, b in zip(total, new, strict=True)]
                optimizer.step()
                units.zero_pruned(student, gates)
            assert total is not None
            criteria = units.with_momentum(criteria, [each / self.prune_interval for each in total])
            gates, _ = units.prune_step(
                criteria,
                gates,
                table,
                steps_done=steps,
                per_step=self.prune_per_step,
                most=most,
                weight=self.latency_weight,
                fixed=fixed,
            )
            units.zero_pruned(student, gates)
            steps, share = steps + 1, units.latency(gates, table) / full
            if steps == 1:
                self._forecast(math.ceil(most / self.prune_per_step), time.perf_counter() - started, work)
            work.progress(f"pruning, latency {share:.2f}", min(most, steps * self.prune_per_step), most)
        work.progress(f"latency by the table: {share:.0%} of the original's, {self.latency_target:.0%} was asked", 0, 0)
        return gates

    def _forecast(self, steps: int, seconds: float, work: Work) -> None:
        """Say, after the first step, how long all may take."""
        trained = seconds / self.prune_interval * self.finetune_steps
        work.progress(
            f"forecast: at most {steps} pruning steps, {math.ceil((steps * seconds + trained) / 60)} min in all", 0, 0
        )

    def _check_target(self, gates: units.Gates, table: LatencyTable, full: float) -> None:
        """Raise TersorError where the target is below the latency of one group of every kind."""
        least = []
        for kind, gate in _with_kinds(gates):
            kept = gate.numel() if kind in _words(self.fixed) else (gate.numel() - 1) % units.GROUP[kind] + 1
            least.append(torch.arange(gate.numel(), device=gate.device) < kept)
        share = units.latency(least, table) / full
        if share > self.latency_target:
            raise TersorError(
                f"latency_target={self.latency_target} is out of reach: one group of each kind that is pruned takes {share:.2f}"
            )


class Data:
    """Random batches of the samples, and the loss on a batch."""

    def __init__(self, work: Work, teacher: nn.Module, method: NViTPruning) -> None:
        found = [batch.get("image", next(iter(batch.get("args", ())), None)) for batch in work.samples]
        pixels = [each for each in found if isinstance(each, Tensor) and each.dim() == 4]
        if not pixels or len(pixels) < len(found):
            raise TersorError("pruning needs images: give --calibration a folder of classes or a packed .npz")
        self.images = torch.cat(pixels).float()
        targets = [batch.get("target") for batch in work.samples]
        with torch.no_grad():
            if all(isinstance(each, Tensor) for each in targets):
                self.labels = torch.cat([each for each in targets if each is not None])
            else:
                self.labels = torch.cat([_logits(teacher, part).argmax(-1) for part in torch.split(self.images, 64)])
        self.teacher, self.size, self.kd_weight = teacher, method.batch_size, method.kd_weight
        self.chance = torch.Generator().manual_seed(0)

    def loss(self, student: nn.Module) -> Tensor:
        chosen = torch.randint(len(self.images), (self.size,), generator=self.chance)
        images = augmented(self.images[chosen], self.chance)
        logits = _logits(student, images)
        loss = F.cross_entropy(logits, self.labels[chosen])
        if self.kd_weight:
            with torch.no_grad():
                wanted = _logits(self.teacher, images).log_softmax(-1)
            loss = loss + self.kd_weight * F.kl_div(
                logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
            )
        return loss


def full_width(model: nn.Module) -> Any:
    """A ViT as the model `nvit` at full width, in eval mode. The output is the mean of both heads of a DeiT."""
    config = models.config_of(model)
    depth, width = config["depth"], config["embed_dim"] // config["num_heads"]
    same = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "qkv_bias", "norm_eps", "distilled")
    found: Any = models.create(
        "nvit",
        heads=(config["num_heads"],) * depth,
        qk=(width,) * depth,
        v=(width,) * depth,
        mlp=(int(config["embed_dim"] * config["mlp_ratio"]),) * depth,
        head_dim=width,
        token_mask=False,
        **{name: config[name] for name in same},
    )
    load_state(found, model.state_dict(), what="the model to prune cannot take this ViT's tensors")
    return found.to(next(model.parameters()).device).eval()


def dense(student: Any, gates: units.Gates) -> nn.Module:
    """The model without the units whose gates are closed. It computes what `student` does with these units at zero."""
    changed, tensors = units.dense_parts(student, gates)
    config = models.config_of(student) | changed
    pruned: nn.Module = models.create(config.pop("tersor_model"), **config)
    load_state(pruned, tensors, what="the pruned model cannot take its own tensors")
    return pruned.to(student.pos_embed.device).eval()


def train(model: nn.Module, data: Data, method: NViTPruning, work: Work) -> None:
    """Train for `finetune_steps` steps of AdamW, with a rate that falls to 0 by a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr)
    for step in range(method.finetune_steps):
        rate = method.lr * (1 + math.cos(math.pi * step / method.finetune_steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.autograd.backward(data.loss(model))
        optimizer.step()
        work.progress("fine-tuning", step + 1, method.finetune_steps)


@torch.no_grad()
def seconds_of(model: nn.Module, images: Tensor) -> float:
    """The median of five calls, after one to warm up."""
    took = []
    for _ in range(6):
        started = time.perf_counter()
        float(_logits(model, images).sum())  # waits for a GPU
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _with_kinds(gates: units.Gates) -> list[tuple[str, Tensor]]:
    return [(units.kind_of(index), gate) for index, gate in enumerate(gates)]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
