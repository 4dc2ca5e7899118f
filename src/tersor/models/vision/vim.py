"""Vim, the bidirectional state-space vision backbone (arXiv 2401.09417), and ToP-ViM, its token pruning (2409.18962).

What it is for: image classification in time linear in the number of tokens; with `prune_after`, on fewer tokens the
deeper the layer.

    model = tersor.models.load("vim_t", "vim_t_midclstok_76p1acc.pth")         # the official dense checkpoint
    pruned = tersor.models.load("vim_t", "vim_t_midclstok_76p1acc.pth", prune_after=(10, 20), keep=0.8)
    logits = pruned(image)                                                     # image (B, 3, 224, 224)

M patches with a class token in their middle, plus positions; then blocks "add, norm, mix":

    residual = hidden + residual;    hidden = mixer(RMSNorm(residual))
    mixer: x | z = W h;  for each direction  u = SiLU(causal depthwise conv(x)),  dt | B | C = Wx u,
           y = scan(u, softplus(Wdt dt + b), A, B, C) + D u,   output = Wo (sum of both directions' y SiLU(z)) / 2

Pruning after a layer: of its N - 1 patches the ceil((N - 1) keep) most important stay, and the class token. The paper's
form, the default: importance is max(0, y) summed over channels and both directions, tokens stay in the order of the
image, and later scans are aligned (tersor.layers.aligned_scan). Which time step a place without a token has is not
published; ours is the step of the next kept token, so a gap of g places decays g times.

Origin: ZLKong/ToP-ViM at b5bc231 (vim/models_mamba.py), Apache-2.0. `pruning="snapshot"` is what that unfinished code
does: the score is the backward direction's gated output, read in reversed order without turning it back; the class token
moves to the middle of the kept, whose number with it is odd; scans are not aligned. Its mistake for batches (only the
first picture's class token is safe) is not repeated. Of the constructor's many switches those of the published models
are built.

Proven: the golden cases of the published code to 5e-6 (kept tokens, class token, logits); keep=1 equals the dense model;
the properties of the alignment. Not proven: ImageNet accuracy (76.1 and 80.5 published dense, 74.8 and 78.4 pruned and
fine-tuned), and that the paper's kernel treats places without tokens as ours does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.selective_scan import selective_scan, time_step
from tersor.layers.aligned_scan import aligned_scan, gaps, importance
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns the class token
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    drop_path_rate: float = 0.1
    prune_after: tuple[int, ...] = ()  # layers, counted from 1, after which tokens are dropped
    keep: float = 0.8  # share of the tokens that stays each time
    pruning: str = "paper"  # or "snapshot": what the released code does

    def __post_init__(self) -> None:
        divides("vim", "patch_size", self.patch_size, "img_size", self.img_size)
        one_of("vim", "pruning", self.pruning, ("paper", "snapshot"))
        at_least("vim", 1, depth=self.depth, embed_dim=self.embed_dim, d_state=self.d_state)
        if not 0 < self.keep <= 1:
            raise TersorError(f"vim keeps a share of its tokens in 0..1, not {self.keep}")
        for layer in self.prune_after:
            one_of("vim", "prune_after", layer, range(1, self.depth + 1))

    def kept(self, tokens: int) -> int:
        """How many of so many tokens stay in a pruning, the class token not counted."""
        count = math.ceil(tokens * self.keep)
        if self.pruning == "snapshot":  # an odd number with the class token, which stands in their middle
            count = min(count + (count % 2 == 0), tokens + 1) - 1
        return count

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2


class Mixer(nn.Module):
    """h (B, N, D) -> the same shape, and the score of every token (B, N)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        D, n = config.embed_dim, config.d_state
        E, rank = 2 * D, math.ceil(D / 16)
        self.widths, self.snapshot = [rank, n, n], config.pruning == "snapshot"
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, D, bias=False)
        self.conv1d, self.conv1d_b = (nn.Conv1d(E, E, 4, padding=3, groups=E) for _ in range(2))
        self.x_proj, self.x_proj_b = (nn.Linear(E, sum(self.widths), bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, E) for _ in range(2))
        self.A_log, self.A_b_log = (nn.Parameter(torch.arange(1.0, n + 1).log().repeat(E, 1)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(E)) for _ in range(2))
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
            dt = torch.empty(E).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
            with torch.no_grad():
                projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back

    def forward(self, h: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(h).chunk(2, -1)
        gate = F.silu(z)
        forward = self.scan(x, places, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        behind = None if places is None else places.flip(1)
        backward = self.scan(
            x.flip(1), behind, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
        ).flip(1)
        if self.snapshot:
            score = (backward * gate).sum(-1).flip(1)  # read as if it were in forward order
        else:
            score = importance(forward) + importance(backward)
        return self.out_proj((forward + backward) * gate / 2), score

    def scan(
        self,
        x: Tensor,
        places: Tensor | None,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: Tensor,
        D: Tensor,
    ) -> Tensor:
        """x (B, N, E) in the order of the scan -> y, before its gate."""
        u = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, B, C = x_proj(u).split(self.widths, -1)
        dt = time_step(dt_proj(dt), dt_softplus=True)
        if places is None:
            return selective_scan(u, dt, -A_log.exp(), B, C, D=D)[0]
        return aligned_scan(u, dt, dt * gaps(places)[..., None], -A_log.exp(), B, C, D=D)


class Block(nn.Module):
    def __init__(self, config: VimConfig, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.embed_dim, eps=1e-5)
        self.mixer = Mixer(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> what the mixer adds, the sum so far, and the tokens' score."""
        residual = residual + self.drop_path(hidden)
        return *self.mixer(self.norm(residual), places), residual


class PatchEmbed(nn.Module):
    """image (B, 3, H, W) -> tokens (B, M, D)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


@register(
    "vim",
    task="classify",
    input="image",
    paper="arXiv 2401.09417",
    variants={
        "vim_t": (7_148_008, {}),
        "vim_s": (25_796_584, {"embed_dim": 384}),
        "top_vim_t": (7_148_008, {"prune_after": (10, 20)}),
        "top_vim_s": (25_796_584, {"embed_dim": 384, "prune_after": (5, 10, 15)}),
    },
    small={
        "img_size": 32,
        "patch_size": 8,
        "num_classes": 10,
        "embed_dim": 16,
        "depth": 3,
        "d_state": 4,
        "prune_after": (1,),
    },
)
class Vim(nn.Module):
    """image (B, C, img_size, img_size) -> logits (B, num_classes)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, D))
        (rates,) = linear_rates(config.drop_path_rate, (config.depth,))
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm_f = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, config.num_classes) if config.num_classes else nn.Identity()
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The class token (B, D), and for every pruning the sorted places in its sequence that stay, without the class."""
        check_image("vim", image, channels=self.config.in_chans)
        if image.shape[-2:] != (self.config.img_size, self.config.img_size):
            side, got = self.config.img_size, " x ".join(map(str, image.shape[-2:]))
            raise TersorError(f"this vim takes images of {side} x {side} pixels, not {got}; img_size sets others")
        patches = self.patch_embed(image)
        middle = self.config.patches // 2
        cls = self.cls_token.expand(image.shape[0], -1, -1)
        hidden = torch.cat((patches[:, :middle], cls, patches[:, middle:]), 1) + self.pos_embed
        residual, aligned = torch.zeros_like(hidden), self.config.pruning == "paper"
        at = torch.full((image.shape[0], 1), middle, device=image.device)  # the class token's place in the sequence
        places: Tensor | None = None  # of the tokens in the image; None: all are there
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers, 1):
            hidden, score, residual = layer(hidden, residual, places)
            if number not in self.config.prune_after:
                continue
            others = self.most_important(score, at)
            half = others.shape[1] // 2
            stay, stands = torch.cat((others[:, :half], at, others[:, half:]), 1), torch.full_like(at, half)
            if aligned:
                stay = stay.sort(1).values
                stands = (others < at).sum(1, keepdim=True)
                places = stay if places is None else places.gather(1, stay)
            hidden, residual, at = _rows(hidden, stay), _rows(residual, stay), stands
            kept.append(others)
        return _rows(self.norm_f(hidden + residual), at).squeeze(1), kept

    def most_important(self, score: Tensor, at: Tensor) -> Tensor:
        """score (B, N), the class token's place (B, 1) -> (B, k): sorted places of the others that stay."""
        count = self.config.kept(score.shape[1] - 1)
        best = score.scatter(1, at, -math.inf).topk(count, dim=1).indices
        return best.sort(1).values

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encode(image)[0])

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.img_size, self.config.img_size)}


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x (B, N, D), places (B, k) -> (B, k, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
