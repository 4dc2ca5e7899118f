"""SD3, the MM-DiT of Stable Diffusion 3: pictures from text by rectified flow (Esser et al., ICML 2024, arXiv 2403.03206).

What it is for: the denoiser of Stable Diffusion 3 and 3.5, on the latents of its autoencoder (16 channels, an eighth of the
pixels a side). Text comes as the outputs of its three text encoders. It is also the base that `ted_viton` dresses people with.

    model = tersor.models.load("sd3_medium", "stable-diffusion-3-medium-diffusers/transformer")
    v = model(hidden_states, encoder_hidden_states, pooled_projections, timestep)        # velocity: noise - latents

hidden_states (B, C, H, W) latents at timestep (B,) of 0 to 1000, encoder_hidden_states (B, M, joint_attention_dim) text tokens,
pooled_projections (B, pooled_projection_dim) -> (B, out_channels, H, W). With N patches of 2 x 2, x (B, N, D), y (B, M, D):

    x = W patches + pos,   y = W text,   c = MLP(sinusoids(t)) + MLP(pooled)      pos: fixed sines, cut out of the table's centre
    s, g, a, s', g', a' = W SiLU(c), for each stream its own                       LN without parameters, eps 1e-6
    x, y += a * Wo softmax(q k^T / sqrt(e)) v        q, k, v of LN(x) (1 + g) + s and LN(y) (1 + g) + s, in one attention
    x, y += a' * MLP(LN(.) (1 + g') + s')            GELU by tanh, hidden 4D; the last block leaves y alone after its attention
    v = unpatch(W (LN(x) (1 + g) + s))

Blocks in `dual_attention_layers` have a second attention among the image tokens, with s, g, a of its own, beside the first.
`beside` and `semantic` are what ted_viton adds: tokens that a block's attention may look at, and keys and values for a second
attention of the image's queries, whose result is added before Wo.

Origin: huggingface/diffusers 0.42.1 (SD3Transformer2DModel), Apache 2.0, whose key names are ours; its table of positions, which
is fixed, is dropped. The weights have Stability's community licence. Not built: the layout of the single original file.

Proven: the golden cases of diffusers; with and without q/k norms and second attention equal to diffusers 0.42.1 with
random weights; parameter counts.
Not proven: pictures from the official weights, which were not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.patch_embed import check_image
from tersor.models.key_maps import drop
from tersor.models.registry import register

FREQUENCIES = 128  # of the timestep's sinusoids
EPS = 1e-6
Streams = tuple[Tensor, Tensor]  # image (B, N, D), context (B, M, D)


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    sample_size: int = 128  # side of the latents that positions are scaled for; other sizes run
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24  # times the above: D
    joint_attention_dim: int = 4096  # of a text token
    caption_projection_dim: int = 1536  # D
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 192  # side of the table of positions, in patches
    qk_norm: str | None = None  # or "rms_norm", of each head's queries and keys, as in 3.5
    dual_attention_layers: tuple[int, ...] = ()  # blocks with a second attention, of the image alone, as in 3.5 Medium

    def __post_init__(self) -> None:
        divides("sd3", "patch_size", self.patch_size, "sample_size", self.sample_size)
        at_least("sd3", 1, num_layers=self.num_layers, in_channels=self.in_channels, out_channels=self.out_channels)
        at_least("sd3", self.sample_size // self.patch_size, pos_embed_max_size=self.pos_embed_max_size)
        for each in self.dual_attention_layers:
            one_of("sd3", "dual_attention_layers", each, range(self.num_layers))
        one_of("sd3", "qk_norm", self.qk_norm, (None, "rms_norm"))
        divides("sd3", "four, for its sines,", 4, "width", self.width)
        if self.caption_projection_dim != self.width:
            raise TersorError(
                f"sd3's caption_projection_dim {self.caption_projection_dim} must be {self.num_attention_heads} heads of "
                f"{self.attention_head_dim}, {self.width}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class PatchEmbed(nn.Module):
    line: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.side, self.patch, self.channels = config.pos_embed_max_size, config.patch_size, config.in_channels
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, config.patch_size)
        scale = config.sample_size // config.patch_size / config.pos_embed_max_size
        self.register_buffer("line", sine_line(self.side, config.width // 2, scale), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, D), row by row."""
        check_image("this sd3", latents, channels=self.channels, multiple=self.patch, at_least=self.patch)
        h, w = (side // self.patch for side in latents.shape[-2:])
        if max(h, w) > self.side:
            raise TersorError(f"this sd3 has positions for {self.side} x {self.side} patches, not {h} x {w}")
        top, left = (self.side - h) // 2, (self.side - w) // 2
        rows, columns = self.line[top : top + h, None], self.line[None, left : left + w]
        pos = torch.cat((columns.expand(h, -1, -1), rows.expand(-1, w, -1)), -1)  # (h, w, D)
        return self.proj(latents).flatten(2).transpose(1, 2) + pos.flatten(0, 1)


class TwoLayers(nn.Module):
    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(d_in, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Condition(nn.Module):
    """Timestep and pooled text -> c (B, D)."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(2 * FREQUENCIES, config.width)
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=timestep.device)
        angles = timestep[:, None].float() * torch.exp(-math.log(10_000) * k / FREQUENCIES)
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(pooled.dtype)
        return self.timestep_embedder(waves) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """c (B, D) -> so many vectors (B, 1, D)."""

    def __init__(self, d: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(d, count * d)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None].chunk(self.count, -1)


class Widen(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d, 4 * d)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The published places are net.0.proj and net.2."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Widen(d), nn.Identity(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OwnAttention(nn.Module):
    """Of the image tokens alone."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        d, e, self.heads = config.width, config.attention_head_dim, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q, self.norm_k = (nn.RMSNorm(e, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](merge(F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)))


class JointAttention(nn.Module):
    """One softmax attention over both streams, each with its own projections."""

    def __init__(self, config: SD3Config, *, last: bool) -> None:
        super().__init__()
        d, self.heads = config.width, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(d, d) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.to_add_out = None if last else nn.Linear(d, d)
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(config.attention_head_dim, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(4)
        )

    def forward(
        self, x: Tensor, y: Tensor, beside: Tensor | None, mask: Tensor | None, semantic: Streams | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), y (B, M, D); beside (B, G, D) is looked at and looks at nothing; mask (B, G): which of it is there."""
        N = x.shape[1]
        seen = x if beside is None else torch.cat((x, beside), 1)
        q = torch.cat((self.norm_q(self.split(self.to_q(x))), self.norm_added_q(self.split(self.add_q_proj(y)))), 2)
        k = torch.cat((self.norm_k(self.split(self.to_k(seen))), self.norm_added_k(self.split(self.add_k_proj(y)))), 2)
        v = torch.cat((self.split(self.to_v(seen)), self.split(self.add_v_proj(y))), 2)
        real = None
        if mask is not None:
            own, text = mask.new_ones(len(mask), N), mask.new_ones(len(mask), y.shape[1])
            real = torch.cat((own, mask, text), 1)[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real)  # (B, heads, N + M, e)
        image, context = mixed[:, :, :N], mixed[:, :, N:]
        if semantic is not None:
            keys, values = (self.split(each) for each in semantic)
            image = image + F.scaled_dot_product_attention(q[:, :, :N], keys, values)
        out = self.to_out[0](merge(image))
        return out, None if self.to_add_out is None else self.to_add_out(merge(context))

    def split(self, x: Tensor) -> Tensor:
        return split(x, self.heads)


class Block(nn.Module):
    def __init__(self, config: SD3Config, index: int, *, last: bool) -> None:
        super().__init__()
        d, self.last, dual = config.width, last, index in config.dual_attention_layers
        self.norm1, self.norm1_context = Modulation(d, 9 if dual else 6), Modulation(d, 2 if last else 6)
        self.attn = JointAttention(config, last=last)
        self.attn2 = OwnAttention(config) if dual else None
        self.ff = FeedForward(d)
        self.ff_context = None if last else FeedForward(d)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        c: Tensor,
        beside: Tensor | None = None,
        mask: Tensor | None = None,
        semantic: Streams | None = None,
    ) -> Streams:
        s, g, a, *rest = self.norm1(c)
        own = self.attn2(modulated(x, *rest[3:5])) if self.attn2 is not None else None
        of_context = self.norm1_context(c)
        sy, gy = of_context[::-1] if self.last else of_context[:2]  # the last one's order is that of norm_out
        near = None if beside is None else modulated(beside, s, g)
        out, context = self.attn(modulated(x, s, g), modulated(y, sy, gy), near, mask, semantic)
        x = x + a * out if own is None else x + a * out + rest[5] * own
        x = residual(x, self.ff, *rest[:3])
        if context is None or self.ff_context is None:
            return x, y
        return x, residual(y + of_context[2] * context, self.ff_context, *of_context[3:])


@register(
    "sd3",
    task="generate-image",
    input="latents",
    paper="arXiv 2403.03206",
    variants={
        "sd3_medium": (2_028_328_000, {}),
        "sd3_5_medium": (
            2_243_171_520,
            {
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
            },
        ),
        "sd3_5_large": (
            8_056_627_520,
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "qk_norm": "rms_norm",
            },
        ),
    },
    small={
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
)
class SD3(nn.Module):
    """Noised latents (B, in_channels, H, W) and text -> velocity (B, out_channels, H, W)."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = Condition(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        last = config.num_layers - 1
        self.transformer_blocks = nn.ModuleList(Block(config, i, last=i == last) for i in range(config.num_layers))
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        beside: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        semantic: Sequence[Streams] | None = None,
    ) -> Tensor:
        """beside: for each block (B, G, D), mask (B, G) for all; semantic: for each block keys and values (B, K, D)."""
        x = self.pos_embed(hidden_states)
        y, c = self.context_embedder(encoder_hidden_states), self.time_text_embed(timestep, pooled_projections)
        for i, block in enumerate(self.transformer_blocks):
            extra = (beside[i] if beside else None, mask, semantic[i] if semantic else None)
            x, y = block(x, y, c, *extra)
        g, s = self.norm_out(c)
        p, w = self.config.patch_size, hidden_states.shape[-1] // self.config.patch_size
        return rearrange(
            self.proj_out(modulated(x, s, g)),
            "b (h w) (p q c) -> b c (h p) (w q)",
            w=w,
            p=p,
            c=self.config.out_channels,
        )

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size),
            "encoder_hidden_states": torch.randn(batch_size, 7, config.joint_attention_dim),
            "pooled_projections": torch.randn(batch_size, config.pooled_projection_dim),
            "timestep": 1000 * torch.rand(batch_size),
        }

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return drop(state, r"^pos_embed\.pos_embed$")


def modulated(x: Tensor, s: Tensor, g: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + g) + s


def residual(x: Tensor, ff: nn.Module, s: Tensor, g: Tensor, a: Tensor) -> Tensor:
    return x + a * ff(modulated(x, s, g))


def split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h e) -> b h n e", h=heads)


def merge(x: Tensor) -> Tensor:
    return rearrange(x, "b h n e -> b n (h e)")


def sine_line(side: int, d: int, scale: float) -> Tensor:
    """(side, d): sines, then cosines, of each place times `scale`. In float64 as published, on the CPU."""
    rates = 10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64, device="cpu") / (d / 2))
    angles = (torch.arange(side, dtype=torch.float64, device="cpu") * scale)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1).float()
