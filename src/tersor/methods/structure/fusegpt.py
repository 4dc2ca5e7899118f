"""FuseGPT: remove whole blocks of a language model and let their neighbours learn from them (Pei et al., arXiv 2411.14507).

What it is for: a model with fewer layers, which is faster on every device and has fewer weights and a smaller cache. It loses
less than by removal alone. The result is a plain model that transformers loads and every other method takes.

    tersor compress fusegpt demo --blocks 1 --samples 64 --seq-len 256 --out shorter
    tersor quantize shorter --bits 4 --group-size 32 --out shorter-4bit

    result = tersor.compress("demo", FuseGPT(blocks=0.25, epochs=5), samples=64, seq_len=256)

For each block to remove:

    1. the block without which the last hidden states stay most alike is chosen (macro influence, block_choice.py)
    2. its linear maps are fused into those of the other blocks of a group of `blocks_per_group` around it (fused_linear.py)
    3. it is removed, and the group learns to give what it gave before: for `epochs` rounds over the samples, by Adam with
       the rate `coef_lr` for coefficients and `base_lr` for the low-rank change of the weights, the norms and the biases,
       both falling to 0 by a cosine

In the end every fused map is folded into a plain one. The loss compares the group's output Y with the output T before, [n,
tokens, d]:

    squared    mean over tokens of ‖Y - T‖² / ‖T‖², so that no token counts more for being large (the default)
    channels   mean over tokens of KL(softmax(T) ‖ softmax(Y)), over the d channels
    batch      the published one: the same, but over the n samples of a batch, divided by n. A batch of one has no loss,
               so it needs `batch_size` 2 or more and samples of one length

`choose` can be another measure, or numbers of blocks, as in `drop-blocks`, which only removes.

Origin: JarvisPei/FuseGPT at 3f2f0d0 (MIT). What differs: the default loss; dropout is off while the group learns; biases are
folded too (the published export drops them), and a bias that was fused earlier is kept; the group is cut to what is left of the
stack; learning is in float32, whatever the model's dtype. As published, the first `influence_batches` batches choose blocks.
The special handling of 13B models (coefficients merged after four fusions) is left out.

Proven: the published code's similarities, fused maps, losses, gradients and a whole training of 20 epochs; fusing alone equals
removal; folding keeps the outputs; GPT-2 and LLaMA load in transformers. Measured on demo: benchmarks/results/fusion.md.
Not proven: the published tables of 7B models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.linear_map import is_conv1d, linear_maps, matrix_shape, weight_matrix
from tersor.methods.method import Report, Work, option, register
from tersor.methods.structure.block_choice import BlockRemoval, choices, how_many, kept_blocks
from tersor.methods.structure.block_stack import Calls, Stack, batches_of
from tersor.methods.structure.fused_linear import MODES, FusedLinear
from tersor.progress import Progress

LOSSES = ("squared", "channels", "batch")


@dataclass(frozen=True)
class FusedBlock(Report):
    """One removed block, by its name in the original."""

    score: float | None  # how little it mattered, by the measure that chose it
    group: int  # how many blocks learned from it
    before: float  # the mean loss of their output before they learned
    after: float


@register
@dataclass(frozen=True)
class FuseGPT(BlockRemoval):
    """Remove blocks of a language model and fuse their weights into the blocks around."""

    name: ClassVar[str] = "fusegpt"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-layers",
        "inference/distillation-logits",
        "practical/pruning",
        "practical/distillation",
    )

    mode: str = option("lora", "coefficients of a fused weight: lora, matrix or vector", choices=MODES)
    lora_rank: int = option(128, "rank of the coefficients in mode lora", least=1)
    blocks_per_group: int = option(
        8,
        "blocks that learn together, the removed one among them",
        check=lambda v: v >= 2 and v % 2 == 0,
        allowed="an even number of 2 or more",
    )
    loss: str = option("squared", "squared, channels, or batch as published", choices=LOSSES)
    epochs: int = option(20, "rounds over the samples", least=0)
    coef_lr: float = option(1e-3, "learning rate of the coefficients", least=0)
    base_lr: float = option(9.65e-6, "learning rate of the weights' low-rank change, norms and biases", least=0)
    batch_size: int = option(8, "samples a step", least=1)
    influence_batches: int = option(4, "batches on which blocks are chosen", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "batch" and self.batch_size < 2:
            raise TersorError("loss='batch' is 0 for a batch of one sample: give batch_size 2 or more, or another loss")

    @property
    def trains(self) -> bool:
        return self.epochs > 0

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        stack = Stack(model)
        count = how_many(self.blocks, self.choose, stack)
        maps = alike_maps(stack)
        dtype = next(model.parameters()).dtype
        if dtype.itemsize < torch.float32.itemsize:
            model.float()
        learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        batches = batches_of(work, self.batch_size)
        recorded = stack.record(batches)
        if self.loss == "batch" and any(len(calls.hidden) < 2 for calls in recorded):
            raise TersorError(
                "loss='batch' is 0 for a batch of one sample: give samples of one length, or another loss"
            )
        chance, few = torch.Generator().manual_seed(0), self.influence_batches
        for choice in choices(stack, self.choose, count, batches[:few], recorded[:few], kept_blocks(stack, work)):
            name, group = stack.names[choice.place], group_around(choice.place, self.blocks_per_group, len(stack))
            lesson = lesson_of(stack, recorded, group, self.loss)
            for n in group:
                wanted = [each for each in maps if work.wanted(f"{stack.names[n]}.{each}")]
                if n != choice.place:
                    fuse(stack.blocks[choice.place], stack.blocks[n], wanted, self.mode, self.lora_rank, chance)
            stack.remove(choice.place, recorded)
            before = lesson.mean_loss(stack)
            lesson.learn(stack, self.epochs, self.coef_lr, self.base_lr, f"fusing {name}", work.progress)
            work.report(FusedBlock(name, choice.score, len(group), before, lesson.mean_loss(stack)))
        for block in stack.blocks:
            fold(block)
        stack.check()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learned[name])
        for parameter in model.parameters():  # not buffers, which may have more precision than the weights
            parameter.data = parameter.data.to(dtype)
        return model


def group_around(fused: int, size: int, count: int) -> range:
    """The blocks that learn together when block `fused` of `count` goes. As published these are `size` blocks around it, shifted
    inwards at both ends of the stack; all blocks, where there are fewer."""
    if count <= size:
        return range(count)
    before, reach = 1 if fused == 0 else fused - 1, size // 2 - 1
    if fused == 0 or before - reach < 0:
        return range(size)
    if fused + reach > count - 1:
        return range(count - size, count)
    return range(before - reach, fused + reach + 1)


def alike_maps(stack: Stack) -> list[str]:
    """The names of the linear maps in a block. Raises TersorError where blocks have different ones."""
    shapes = [
        {n: matrix_shape(m) for n, m in linear_maps(block).items() if isinstance(m, nn.Linear) or is_conv1d(m)}
        for block in stack.blocks
    ]
    for name, other in zip(stack.names, shapes, strict=True):
        if other != shapes[0]:
            raise TersorError(f"{name} has other linear maps than {stack.names[0]}, so their weights cannot be fused")
    return list(shapes[0])


def fuse(
    source: nn.Module, into: nn.Module, maps: Sequence[str], mode: str, rank: int, chance: torch.Generator
) -> None:
    """Fuse the linear maps of one block into those of another. The other computes the same until it learns."""
    for name in maps:
        given, taking = source.get_submodule(name), into.get_submodule(name)
        if not isinstance(taking, FusedLinear):
            taking = FusedLinear(taking, mode=mode, rank=rank, chance=chance)
            into.set_submodule(name, taking)
        if isinstance(given, FusedLinear):
            taking.fuse(given.effective_weight(), given.effective_bias())
        else:
            taking.fuse(weight_matrix(given), getattr(given, "bias", None))


def fold(block: nn.Module) -> None:
    """Replace the fused maps by plain ones; the block computes the same."""
    for name, module in list(block.named_modules()):
        if isinstance(module, FusedLinear):
            block.set_submodule(name, module.folded())


@dataclass
class Lesson:
    """What a group of blocks learns, batch by batch."""

    group: range  # its blocks, without the removed one
    recorded: Sequence[Calls]
    inputs: list[Tensor]  # hidden states that enter the group
    targets: list[Tensor]  # hidden states that left it before the removal
    kind: str

    def loss(self, stack: Stack, n: int) -> Tensor:
        """The loss on batch n."""
        return divergence(self.targets[n], stack.run(self.recorded[n], self.group, self.inputs[n]), self.kind)

    @torch.no_grad()
    def mean_loss(self, stack: Stack) -> float:
        return sum(float(self.loss(stack, n)) for n in range(len(self.inputs))) / len(self.inputs)

    def learn(self, stack: Stack, epochs: int, coef_lr: float, base_lr: float, what: str, progress: Progress) -> None:
        """Learn by Adam, `epochs` times over all batches in order. Both rates fall to 0 by a cosine."""
        coefficients, others = trained_parameters([stack.blocks[n] for n in self.group])
        groups = [{"params": coefficients, "lr": coef_lr}, {"params": others, "lr": base_lr}]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8)
        steps = max(1, epochs * len(self.inputs))
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for step in range(epochs * len(self.inputs)):
            optimizer.zero_grad()
            torch.autograd.backward(self.loss(stack, step % len(self.inputs)))
            optimizer.step()
            falling.step()
            progress(what, step + 1, steps)
        for parameter in (*coefficients, *others):
            parameter.requires_grad_(False)


@torch.no_grad()
def lesson_of(stack: Stack, recorded: Sequence[Calls], group: range, kind: str) -> Lesson:
    """The lesson of a group, made before a block of it is removed."""
    inputs = [stack.run(calls, range(group.start), calls.hidden) for calls in recorded]
    targets = [stack.run(calls, group, hidden) for calls, hidden in zip(recorded, inputs, strict=True)]
    return Lesson(range(group.start, group.stop - 1), recorded, inputs, targets, kind)


def trained_parameters(blocks: Sequence[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The coefficients; and the low-rank parts and biases of fused maps, with vectors outside them (norms). They get gradients
    from now on. A map that is not fused stays as it is."""
    coefficients, others = [], []
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, FusedLinear):
            own = {name: p for name, p in module.named_parameters() if name != "weight"}
            coefficients += [p for name, p in own.items() if "coef" in name]
            others += [p for name, p in own.items() if "coef" not in name]
        elif not (isinstance(module, nn.Linear | nn.ParameterList) or is_conv1d(module)):
            others += [p for p in module.parameters(recurse=False) if p.dim() == 1]
    for parameter in (*coefficients, *others):
        parameter.requires_grad_(True)
    return coefficients, others


def divergence(target: Tensor, output: Tensor, kind: str) -> Tensor:
    """The loss of this kind between output and target [n, tokens, d], a scalar; see the module's docstring."""
    if kind == "squared":
        return ((output - target).square().sum(-1) / target.square().sum(-1)).mean()
    axis = 0 if kind == "batch" else -1
    wanted, found = target.log_softmax(axis), output.log_softmax(axis)
    total = F.kl_div(found, wanted, reduction="sum", log_target=True)
    return total / (len(target) if kind == "batch" else target[..., 0].numel())
