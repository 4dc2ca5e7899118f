"""Rounding learned block by block: integers of a packed model move by one where a block comes closer to the original's.

What it is for: a step after `gptq` and before `scales`, which gains most at 2 bits. GPTQ looks at one layer at a time and
decides each integer once. Here the layers of a block learn together, so that each makes up for the others' errors.

    steps: [{method: gptq, bits: 2}, {method: rounding}, {method: scales}]

    tersor compress rounding PACKED --original MODEL --calibration text.txt --out out

Block by block. q_0 and s_0 are integers and steps as the step before left them. x̂ are the block's inputs in the packed model,
where the blocks before it are done. y is the output of the same block in the original model:

    W = s_0 exp(r) (round(q_0 + v) - z)       v [out, in] from 0, within [-1, 1]; r [out, groups] from 0
    loss = ‖block(x̂; W) - y‖² / ‖y‖²          over the samples, by Adam; the gradient goes straight through the rounding

`travel` is how far an offset moves if its gradient has one sign in all steps. An offset of a half moves an integer.

The inputs are the packed model's and the target is the original's, so a block also makes up for what the blocks before it lost.
A layer keeps to the levels that it uses, so ternary weights stay ternary. Every eighth sample is kept apart. By its error on
these a block keeps the best of its epochs, or its start. In the end everything is undone unless the whole model's loss on them
(that of `scales`) fell.

It cannot follow a sparse step, whose zeros would be lost. float16 models are tuned in float32, for the gradients.

What differs from AutoRound (arXiv 2309.05516): it starts from GPTQ's integers, not from plain rounding. Integers may move by
one, not only to the other neighbour of the weight. Adam replaces the sign of the gradient. The target is the original's output
on exact inputs. As there, each weight has an offset that learns, and the ranges learn too.

Origin: no code was read. Proven: integers move by at most one within their levels; errors on samples kept apart never rise; the
numbers in the file are those that were tuned. Measured: benchmarks/results/ladder.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import call, first_tensor
from tersor.calibrate.blocks import Unit, units_of
from tersor.calibrate.lockstep import Call, Lockstep
from tersor.errors import TersorError
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.quantized_linear import QuantizedLinear, packed_layers
from tersor.methods.method import PackedMethod, Report, Work, option, register
from tersor.methods.training.held_out import drawn, judged, learn, split, travelled
from tersor.methods.training.tuned_weight import TunedWeight, learning


@dataclass(frozen=True)
class RoundedBlock(Report):
    """One block; or the whole model, under the name `(all)`."""

    before: float  # ‖block(x̂) - y‖² / ‖y‖² on the samples kept apart; of the whole model, its loss on them
    after: float
    moved: float | None = None  # the share of integers that moved
    note: str = ""


@register
@dataclass(frozen=True)
class Rounding(PackedMethod):
    """Move integers of a packed model by one, block by block, so that blocks give what the original's give. A step after gptq."""

    name: ClassVar[str] = "rounding"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-uniform",
        "practical/quantization",
    )

    epochs: int = option(4, "passes over the samples for each block", least=1)
    travel: float = option(1.3, "how far an integer's offset could go in all steps together", above=0)
    step_lr: float = option(5e-3, "learning rate of the scales, a share of their size; 0: they stay", least=0, below=1)
    batch_size: int = option(2, "samples a step", least=1)
    order_seed: int = option(0, "seed of the order of samples", least=0)

    @property
    def moves_integers(self) -> bool:
        return True

    def tune(self, model: nn.Module, original: nn.Module, work: Work) -> None:
        samples, apart = split(work.samples, self.name)
        layers = {name: layer for name, layer in packed_layers(model).items() if work.wanted(name)}
        if not layers:
            raise TersorError("no packed layer is left to tune")
        kept = {name: layer.packed for name, layer in layers.items()}
        start = judged(model, original, apart)
        units = units_of(original)
        mine = [Unit(each.name, model.get_submodule(each.name), each.is_block) for each in units]
        everything = [*samples, *apart]
        total = sum(each.is_block for each in units)
        done: set[str] = set()

        def run(module: nn.Module, parts: list[Unit]) -> Lockstep:
            return Lockstep(module, parts, everything, lambda batch: call(module, batch))

        with run(model, mine) as packed, run(original, units) as exact:
            for found, wanted in zip(packed, exact, strict=True):
                if found.unit.name != wanted.unit.name:
                    raise TersorError(
                        f"the packed model reaches {found.unit.name} where its original is at {wanted.unit.name}"
                    )
                wanted.run()
                name = found.unit.name
                inside = _inside(name, layers)
                if found.unit.is_block and name not in done and inside:
                    work.progress(f"rounding {name}", len(done), total)
                    done.add(name)
                    targets = [first_tensor(each.output) for each in wanted.calls]
                    work.report(self._learn(name, inside, found.calls, targets, len(samples)))
                found.run()
        end = judged(model, original, apart)
        note = ""
        if not end < start:
            note, end = f"would have been {end:.4g}: left as it was", start
            for name, layer in layers.items():
                layer.put(kept[name])
        work.progress("rounding", total, total)
        work.report(RoundedBlock("(all)", start, end, _share(kept, layers), note))

    def _learn(
        self,
        name: str,
        layers: Mapping[str, QuantizedLinear],
        calls: Sequence[Call],
        targets: Sequence[Tensor | None],
        count: int,
    ) -> RoundedBlock:
        """One block. The first `count` samples are learned from, the others are kept apart."""
        if len(calls) != len(targets) or any(each is None for each in targets):
            return RoundedBlock(
                name, math.nan, math.nan, 0.0, "not every sample reaches it with a tensor: left as it was"
            )
        to_learn = [n for n, each in enumerate(calls) if each.sample < count]
        to_judge = [n for n, each in enumerate(calls) if each.sample >= count]
        if not to_learn or not to_judge:
            return RoundedBlock(name, math.nan, math.nan, 0.0, "too few samples reach it: left as it was")
        size = torch.stack([each.float().square().mean() for each in targets if each is not None]).mean()

        def error(n: int) -> Tensor:
            output, target = first_tensor(calls[n].run()), targets[n]
            assert output is not None
            assert target is not None
            return (output.float() - target.float()).square().mean() / size.clamp(min=1e-30)

        def backward(step: int, chosen: list[int]) -> None:
            for n in chosen:
                torch.autograd.backward(error(to_learn[n]) / len(chosen))

        def judge() -> float:
            return float(torch.stack([error(n) for n in to_judge]).mean())

        weights = [TunedWeight(layer, moves=True) for layer in layers.values()]
        offsets = [each.offset for each in weights if each.offset is not None]
        steps = [each.log_step for each in weights] if self.step_lr else []
        order = drawn(len(to_learn), self.batch_size, self.epochs, self.order_seed)
        with learning(weights):
            start = judge()
            best = learn(
                [(offsets, self.travel / travelled(len(order))), (steps, self.step_lr)],
                order,
                epochs=self.epochs,
                offsets=offsets,
                backward=backward,
                judge=judge,
                start=start,
            )
        moved = sum(each.moved() for each in weights) / sum(each.codes.numel() for each in weights)
        return RoundedBlock(name, start, best, moved)


def _inside(block: str, layers: Mapping[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in layers.items() if not block or name.startswith(f"{block}.")}


def _share(before: Mapping[str, QuantizedWeight], layers: Mapping[str, QuantizedLinear]) -> float:
    """The share of integers that differ."""
    moved = sum(int((layer.packed.codes() != before[name].codes()).sum()) for name, layer in layers.items())
    return moved / sum(layer.in_features * layer.out_features for layer in layers.values())
