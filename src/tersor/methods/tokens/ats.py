"""Adaptive token sampling: a trained ViT drops the tokens that its class token does not look at (arXiv 2111.15667).

    tersor compress ats demo-vit --out cheaper                       # sampling in blocks 3, 4, ... as published
    tersor compress ats demo-vit --ats-blocks 2-5 --num-tokens 0.5 --out cheaper
    tersor eval cheaper --images cifar10_test_1000.npz

Nothing is trained and no weight changes: the result is the model `ats` (models/vision/ats.py has the formulas) with the ViT's
weights. Every image keeps another number of tokens; `num_tokens` bounds it. With `--calibration` the report says how many
tokens those images kept.

It takes ViT and DeiT without a distillation token. The result can be quantized: `tersor quantize cheaper --calibration ...`. A
block whose `qkv` is excluded (by `--include` or `--exclude`) stays an ordinary one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor import models
from tersor.calibrate.batches import call, without_target
from tersor.errors import TersorError
from tersor.methods.method import Method, ModelMethod, Report, Work, option, register
from tersor.models.loading import load_state

RANGE = re.compile(r"(\d+)(?:(-)(\d*))?")


@dataclass(frozen=True)
class SampledBlock(Report):
    """One block that drops tokens."""

    most: int  # tokens that it keeps at most, with the class token
    tokens: float | None  # that it kept on the samples, on average

    def row(self) -> dict[str, Any]:
        return {"name": self.name, "most tokens": self.most, "tokens left": "" if self.tokens is None else self.tokens}


@register
@dataclass(frozen=True)
class AdaptiveTokenSampling(ModelMethod):
    """Drop, for each image, the tokens that matter least; no training, no calibration."""

    name: ClassVar[str] = "ats"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-tokens",
        "inference/pruning-post-training",
        "practical/pruning",
        "practical/conditional",
    )
    keeps_size: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = False

    ats_blocks: str = option(
        "3-",
        "blocks that drop tokens: `3-8`, `3-` (to the last), `2,4,6`; the first is 0",
        check=lambda v: isinstance(v, str) and all(RANGE.fullmatch(part.strip()) for part in v.split(",")),
        allowed="numbers and ranges such as 3-8, 3- or 2,4,6",
    )
    num_tokens: float = option(
        1.0,
        "most tokens that such a block leaves, or their share (up to 1) of an image's; 8 are always left",
        check=lambda v: 0 < v <= 1 or (v > 1 and v == int(v)),
        allowed="a share between 0 and 1, or a whole number above 1",
    )
    drop_tokens: bool = option(True, "remove dropped tokens; without it they are masked, which saves nothing")

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(num_tokens=share)] for share in (1.0, 0.5)] if kind == "image" else []

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        if getattr(type(model), "system", None) != "vit":
            raise TersorError(
                f"{type(model).__name__} is no ViT: token sampling takes ViT and DeiT (demo-vit, vit_*, deit_*)"
            )
        config = models.config_of(model)
        depth = config["depth"]
        chosen = [n for n in self.blocks(depth) if work.wanted(f"blocks.{n}.attn.qkv")]
        if not chosen:
            raise TersorError(f"ats_blocks={self.ats_blocks!r} leaves no block to sample tokens in")
        config |= {
            "tersor_model": "ats",
            "ats_blocks": tuple(chosen),
            "num_tokens": (self.num_tokens,) * depth,
            "drop_tokens": self.drop_tokens,
        }
        sampling: Any = models.create(config.pop("tersor_model"), **config)
        load_state(sampling, model.state_dict(), what="the token-sampling model cannot take this ViT's tensors")
        first = next(model.parameters())
        sampling.to(first.device, first.dtype).eval()
        left = _tokens_left(sampling, work)
        for n in chosen:
            tokens = None if left is None else float(left[n])
            work.report(SampledBlock(f"blocks.{n}", sampling.config.budget(n), tokens))
        compressed: nn.Module = sampling
        return compressed

    def blocks(self, depth: int) -> list[int]:
        """The block numbers in `ats_blocks`. Raises TersorError where a model of `depth` blocks lacks one."""
        found: set[int] = set()
        for part in self.ats_blocks.split(","):
            match = RANGE.fullmatch(part.strip())
            assert match is not None  # checked on construction
            first, last = int(match[1]), int(match[3] or depth - 1) if match[2] else int(match[1])
            if last < first:
                raise TersorError(
                    f"ats_blocks={self.ats_blocks!r}: {part.strip()} goes backwards; write {last}-{first}"
                )
            if last >= depth:
                raise TersorError(
                    f"ats_blocks={self.ats_blocks!r}: the model has blocks 0 to {depth - 1}, not {part.strip()}"
                )
            found.update(range(first, last + 1))
        return sorted(found)


@torch.no_grad()
def _tokens_left(model: Any, work: Work) -> Tensor | None:
    """Tokens left after each block, [depth], on average over the samples; None without any."""
    counts = []
    for n, batch in enumerate(work.samples):
        counts.append(call(model.tokens, without_target(batch)))
        work.progress("counting tokens", n + 1, len(work.samples))
    return torch.cat(counts).double().mean(0) if counts else None
