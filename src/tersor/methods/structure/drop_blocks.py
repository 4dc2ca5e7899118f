"""Remove the blocks of a transformer that matter least; nothing is trained.

What it is for: the plainest way to a faster model. It saves time and memory on every device, with cache and without. It is also
the baseline of `fusegpt`, which lets other blocks learn from the removed ones. Quality falls fast: see
benchmarks/results/fusion.md.

    tersor compress drop-blocks demo --blocks 1 --out shorter
    tersor compress drop-blocks demo --blocks 0.25 --choose perplexity --out shorter
    tersor compress drop-blocks demo --blocks 2 --choose 3,4 --out shorter

`choose` is one of (block_choice.py has the formulas)

    macro-influence   how similar the last hidden states stay without the block (FuseGPT, arXiv 2411.14507)
    block-influence   how similar the block's output is to its input, all blocks at once (ShortGPT, arXiv 2403.03853)
    perplexity        how well the model predicts the samples without the block (SLEB, arXiv 2402.09025)
    3,4               these blocks, by their numbers from 0

The result is a plain model of fewer layers that transformers loads. It takes models of transformers with one stack of equal
blocks (LLaMA, Mistral, Qwen, GPT-2, BERT); perplexity needs one that predicts tokens. A block with an excluded layer stays.

Proven: each choice against its definition, the same outputs as running the original without the blocks, loading by
transformers. Not proven: ShortGPT's and SLEB's published tables; SLEB's code is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tersor.methods.method import Method, Report, Work, option, register
from tersor.methods.structure.block_choice import CHOICES, BlockRemoval, choices, how_many, kept_blocks
from tersor.methods.structure.block_stack import Stack, batches_of


@dataclass(frozen=True)
class DroppedBlock(Report):
    """One removed block, by its name in the original."""

    score: float | None  # how little it mattered, by the measure that chose it


@register
@dataclass(frozen=True)
class DropBlocks(BlockRemoval):
    """Remove the blocks that matter least; no training."""

    name: ClassVar[str] = "drop-blocks"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-layers",
        "inference/pruning-post-training",
        "practical/pruning",
    )

    batch_size: int = option(8, "samples that run at once", least=1)

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(blocks=share)] for share in (0.1, 0.25)] if kind == "text" else []

    @property
    def needs_samples(self) -> bool:
        return self.choose in CHOICES

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        stack = Stack(model)
        count = how_many(self.blocks, self.choose, stack)
        batches = batches_of(work, self.batch_size) if self.needs_samples else []
        recorded = stack.record(batches) if self.choose in ("macro-influence", "block-influence") else []
        for n, choice in enumerate(choices(stack, self.choose, count, batches, recorded, kept_blocks(stack, work))):
            work.report(DroppedBlock(stack.names[choice.place], choice.score))
            stack.remove(choice.place, recorded)
            work.progress("removing blocks", n + 1, count)
        stack.check()
        return model
