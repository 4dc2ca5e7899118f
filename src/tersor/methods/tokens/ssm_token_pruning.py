"""Token pruning for state-space vision models: Vim and PlainMamba on fewer tokens the deeper the layer (arXiv 2409.18962).

    tersor compress ssm-token-pruning VIM --prune-after 10,20 --keep 0.8 --out pruned
    tersor train pruned --data pictures --lr 5e-6 --epochs 30 --out tuned       # the paper trains on for 30 epochs

After each named layer the share `keep` of the patches stays: those with the largest scan outputs, max(0, y) summed over
channels and directions. Later scans are aligned: a dropped token no longer feeds the state, but the state still decays over its
place (layers/aligned_scan.py has the recurrence). The class token of Vim always stays. No weight changes, and none is added:
the result is the same architecture with `prune_after` and `keep` in its config.

The cost of an image is nearly proportional to its tokens, so the report says how many each part of the model has, and their
share of the unpruned model's. For Vim, `pruning=snapshot` does what the released, unfinished code does.

Origin: the paper, and ZLKong/ToP-ViM at b5bc231. The paper does not say by which step a place without a token decays; here it
is the step of the next kept token (models/vision/vim.py). benchmarks/results/ssm_token_pruning.md has the speed, and a Vim
trained here: the kept tokens were worth more than random ones, but alignment made no difference beyond chance. Not proven:
the accuracy on ImageNet that the paper reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tersor import models
from tersor.errors import TersorError
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.models.loading import load_state

LAYERS = re.compile(r"\s*\d+\s*(,\s*\d+\s*)*")
DEPTH = {"vim": "depth", "plainmamba": "num_layers"}  # system: the field of its config that counts the layers


@dataclass(frozen=True)
class PrunedLayers(Report):
    """Layers between two prunings."""

    tokens: int  # of each of these layers, for an image of the model's size
    share: float  # of the unpruned model's tokens

    def row(self) -> dict[str, Any]:
        return {"name": self.name, "tokens": self.tokens, "share": round(self.share, 3)}


@register
@dataclass(frozen=True)
class SsmTokenPruning(ModelMethod):
    """Drop the tokens with the smallest scan outputs in a state-space vision model; no training, no calibration."""

    name: ClassVar[str] = "ssm-token-pruning"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-tokens",
        "practical/pruning",
    )
    needs_samples: ClassVar[bool] = False
    takes_layers: ClassVar[bool] = False

    prune_after: str = option(
        "",
        "layers after which tokens are dropped, such as 10,20; the first is 1. Without it after each quarter of them",
        check=lambda v: v == "" or LAYERS.fullmatch(v) is not None,
        allowed="numbers with commas between, such as 10,20",
    )
    keep: float = option(0.8, "share of the tokens that stays each time", above=0, most=1)
    pruning: str = option(
        "paper", "`paper`, or `snapshot`: what the released code of Vim does", choices=("paper", "snapshot")
    )

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        system = getattr(type(model), "system", None)
        if system not in DEPTH:
            raise TersorError(
                f"{type(model).__name__} is no state-space vision model whose tokens can be dropped: "
                "ssm-token-pruning takes vim and plainmamba (vim_t, vim_s, plainmamba_l1 to l3)"
            )
        config = models.config_of(model)
        if config["prune_after"]:
            raise TersorError(
                f"this model drops tokens already, after layers {', '.join(map(str, config['prune_after']))}; "
                "give the unpruned one"
            )
        if system == "plainmamba" and self.pruning != "paper":
            raise TersorError(f"pruning={self.pruning!r} is for vim; nobody published code for PlainMamba's")
        layers = self.layers(config[DEPTH[system]])
        config |= {"prune_after": tuple(layers), "keep": self.keep}
        if system == "vim":
            config["pruning"] = self.pruning
        pruned: Any = models.create(config.pop("tersor_model"), **config)
        load_state(pruned, model.state_dict(), what="the pruned model cannot take this model's tensors")
        first = next(model.parameters())
        pruned.to(first.device, first.dtype).eval()
        for report in self.counted(layers, config[DEPTH[system]], pruned):
            work.report(report)
        found: nn.Module = pruned
        return found

    def layers(self, depth: int) -> list[int]:
        """The layer numbers in `prune_after`. Raises TersorError where a model of `depth` layers lacks one."""
        if not self.prune_after:
            if depth < 2:
                raise TersorError(f"the model has {depth} layer: no later one would have fewer tokens")
            return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})
        chosen = sorted({int(part) for part in self.prune_after.split(",")})
        for layer in chosen:
            if not 1 <= layer < depth:
                raise TersorError(
                    f"prune_after={self.prune_after!r}: the model has layers 1 to {depth}, and after {layer} "
                    + ("none is left to be cheaper" if layer == depth else "there is none")
                )
        return chosen

    def counted(self, layers: list[int], depth: int, pruned: Any) -> list[PrunedLayers]:
        """How many tokens the layers have, for an image of the model's own size; and in the last row the mean share of all
        layers."""
        config, classes = pruned.config, int(hasattr(pruned, "cls_token"))
        patches = (config.img_size // config.patch_size) ** 2
        whole, found, done = patches + classes, [], 0
        seen = 0
        for upto in [*layers, depth]:
            tokens = patches + classes
            found.append(PrunedLayers(f"layers {done + 1}-{upto}", tokens, tokens / whole))
            seen += tokens * (upto - done)
            patches, done = config.kept(patches), upto
        return [*found, PrunedLayers("all layers, mean", round(seen / depth), seen / (depth * whole))]
