"""Scales tuned end to end: the steps of a packed model learn so that it predicts what the original does (EfficientQAT, arXiv
2407.11062).

What it is for: the last step after `gptq`. GPTQ looks at one layer at a time; here all layers are tuned together on the model's
output. The file keeps its format and its size, and any reader takes it. It gains most at 2 bits.

    tersor compress recipe steps.yaml demo --calibration text.txt --out out      # steps: [{method: gptq, ...}, {method: scales}]
    tersor compress scales PACKED --original MODEL --calibration text.txt --out out

    tersor.compress("demo", [GPTQ(bits=2), Scales()], calibration="text.txt")

    W = s_0 exp(r) (q - z)         q, z as they are; r [out, groups], 0 at the start, learns by Adam
    loss                           KL(original || packed), mean over tokens, where the model has `logits`; else the squared error
                                   of its first output relative to the output

With `--integers` integers move too, each by one at most, as in `rounding` but by the final loss; this takes 12 more bytes per
weight. `travel` is how far an offset moves if its gradient has one sign in all steps. An offset of a half moves an integer.

Every forward pass uses the steps as the file will hold them (float16 or the model's own dtype); the gradient goes straight
through that rounding. The rate rises over the first twentieth of the steps, and falls as half a cosine. Every eighth sample is
kept apart. The loss on these is taken at the start and after every epoch, and the best state is kept, so the result is never
worse there than the start. Where no epoch was better, all epochs run once more at a quarter of the rates: finer grids may need
that. Activations inside blocks are computed again for the gradient, so memory holds both models, one block's activations and
the logits. With `--no-recompute` they are kept, which is faster and takes more memory.

After a sparse step integers stay, because zeros would be lost. float16 models are tuned in float32, for the gradients.

What differs from EfficientQAT's second phase: the target is the original's predictions instead of the text, so the model does not
learn a text that it was never trained on. Steps move in proportion to their size.

Proven: without `--integers` only scales change, with it integers by one at most; the loss on samples kept apart never rises;
the file's numbers are those that were tuned; saved and loaded equal. Measured: benchmarks/results/ladder.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tersor.calibrate.blocks import find_blocks
from tersor.errors import TersorError
from tersor.layers.quantized_linear import packed_layers
from tersor.methods.method import PackedMethod, Report, Work, option, register
from tersor.methods.training.held_out import as_batches, divergence, drawn, judged, learn, split, travelled
from tersor.methods.training.tuned_weight import TunedWeight, learning

SHARES = (1.0, 0.25)  # of the rates, tried in turn until the samples kept apart get better


@dataclass(frozen=True)
class TunedSteps(Report):
    """One layer; or the whole model, under the name `(all)`."""

    change: float | None  # of a layer's steps: the mean of |s / s_0 - 1|
    moved: float | None  # the share of a layer's integers that moved
    before: float | None = None  # the model's loss on the samples kept apart
    after: float | None = None
    note: str = ""


@register
@dataclass(frozen=True)
class Scales(PackedMethod):
    """Tune the scales of a packed model so that it predicts what the original does. A step after gptq, rtn or rounding."""

    name: ClassVar[str] = "scales"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-uniform",
        "inference/distillation-logits",
        "practical/quantization",
    )

    epochs: int = option(2, "passes over the samples", least=1)
    lr: float = option(1e-2, "learning rate of Adam, a share of each step's size", above=0, below=1)
    batch_size: int = option(1, "samples a step", least=1)
    integers: bool = option(False, "let integers move by one too")
    travel: float = option(2.0, "how far an integer's offset could go in all steps together", above=0)
    recompute: bool = option(True, "compute activations inside blocks again for the gradient, which takes less memory")
    order_seed: int = option(0, "seed of the order of samples", least=0)

    @property
    def moves_integers(self) -> bool:
        return self.integers

    def tune(self, model: nn.Module, original: nn.Module, work: Work) -> None:
        samples, apart = split(work.samples, self.name)
        layers = {name: layer for name, layer in packed_layers(model).items() if work.wanted(name)}
        if not layers:
            raise TersorError("no packed layer is left to tune")
        weights = {name: TunedWeight(layer, moves=self.integers) for name, layer in layers.items()}
        blocks = [model.get_submodule(each.name) for each in find_blocks(original) if each.name] * self.recompute
        steps = [each.log_step for each in weights.values()]
        offsets = [each.offset for each in weights.values() if each.offset is not None]
        order = drawn(len(samples), self.batch_size, self.epochs, self.order_seed)

        def backward(step: int, chosen: list[int]) -> None:
            with checkpointed(blocks):
                loss = self._backward(model, original, [samples[n] for n in chosen])
            if not math.isfinite(loss):
                raise TersorError(f"the loss is not finite at step {step + 1}: a lower lr may help")
            work.progress(f"tuning scales, loss {loss:.4g}", step + 1, len(order))

        with learning(weights.values()):
            start = best = judged(model, original, apart)
            for share in SHARES:
                best = learn(
                    [(steps, share * self.lr), (offsets, share * self.travel / travelled(len(order)))],
                    order,
                    epochs=self.epochs,
                    offsets=offsets,
                    backward=backward,
                    judge=lambda: judged(model, original, apart),
                    start=start,
                )
                if best < start:
                    break
            for name, weight in weights.items():
                change = (weight.steps() / weight.start - 1).abs().mean()
                work.report(TunedSteps(name, float(change), weight.moved() / weight.codes.numel()))
        note = "" if best < start else "no epoch was better on the samples kept apart: left as it was"
        work.report(TunedSteps("(all)", None, None, start, best, note))

    @staticmethod
    def _backward(model: nn.Module, original: nn.Module, samples: list[dict[str, Any]]) -> float:
        """Make the gradients of the mean loss over the samples; returns that loss."""
        total = 0.0
        for batch, weight in as_batches(samples):
            loss = divergence(model, original, [batch]) * weight
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Meanwhile these blocks forget their activations and compute them again for the gradient."""
    with ExitStack() as stack:
        for block in blocks:
            _wrap(block, stack)
        yield


def _wrap(block: nn.Module, stack: ExitStack) -> None:
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = again
    stack.callback(delattr, block, "forward")
