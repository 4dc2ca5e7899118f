"""G3PT, next-scale generation of shapes (Zhang, Xiong, Xu 2024, arXiv 2409.06322).

What it is for: shapes of a class, or for a context such as DINOv2 tokens of a picture, drawn coarse to fine in as many passes as
there are scales, however many tokens they have. `g3pt_tokenizer` makes the tokens and turns them into a surface.

    shared = {"scales": (1, 4, 16), "bits": 6, "num_latents": 16}
    tokenizer = tersor.models.create("g3pt_tokenizer", width=32, num_heads=2, **shared)
    model = tersor.models.create("g3pt", width=32, num_heads=2, latent_width=32, latent_heads=2, num_classes=3, **shared)
    model.take_quantizer(tokenizer)                                                       # what turns tokens into features
    tokens = model.eval().generate(torch.tensor([2]), guidance=2.0, top_p=0.9)            # (1, 21), a shape of class 2

From a folder with both as `transformer/` and `vae/`: `tersor sample DIR --prompt 2 --out shape.glb`.

tokens (B, sum n_s), label (B,) and context (B, l, D) -> logits (B, sum n_s, 2^d). The sequence is

    [ label or start | W context | e_1 | e_2 | ... | e_S ]
    e_s = D_s(Zhat of the scales before s) + scale_s + position_s         (n_s tokens); e_1 = start + scale_1 + position_1

with Zhat from the tokenizer's own U_s, which is part of this model and frozen, and D_s queries of this model. A token of
scale s sees what stands in front, and the scales up to its own, all of its own included, none later (block-causal). All
tokens of a scale are predicted at once, each as one of 2^d codes; the loss is the cross-entropy over all scales. At
inference the scales before are kept as keys and values: S passes.

Guidance w other than 1: logits_0 + w (logits - logits_0), where 0 is the model for no label and a context of zeros, which
training shows it with the share `condition_dropout`.

Origin: the paper has neither code nor weights. Not in its abstract, so a reconstruction: one softmax over the codes (not d
single bits), conditions as tokens in front, pre-norm blocks, the sizes. Proven, as properties: the block-causal mask, cached
passes equal to the whole, S passes whatever the number of tokens. It writes five shapes that it learned
(benchmarks/results/shapes.md). Not proven: any published number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.layers.lookup_free import to_codes
from tersor.models.points.g3pt_tokenizer import MLP, G3PTTokenizer, Querying, check_scales
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class G3PTConfig:
    width: int = 768  # C of this model
    depth: int = 12
    num_heads: int = 12
    num_classes: int = 0  # 0: no labels
    context_dim: int | None = None  # D; None: no context
    condition_dropout: float = 0.1  # in training, samples whose label and context are left out
    # of the tokenizer
    scales: tuple[int, ...] = (1, 4, 16, 64, 256, 576, 1024, 2304)
    bits: int = 13  # d
    num_latents: int = 3072  # L
    latent_width: int = 768
    latent_heads: int = 12

    def __post_init__(self) -> None:
        at_least("g3pt", 0, num_classes=self.num_classes, condition_dropout=self.condition_dropout)
        at_least("g3pt", 1, depth=self.depth, num_latents=self.num_latents)
        divides("g3pt", "num_heads", self.num_heads, "width", self.width)
        divides("g3pt", "latent_heads", self.latent_heads, "latent_width", self.latent_width)
        check_scales("g3pt", self.scales)


class Past:
    """Keys and values of one layer, of the scales so far."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return self.k, self.v


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (s h e) -> s b h n e", s=3, h=self.heads)
        if past is not None:
            k, v = past.extend(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(mixed, "b h n e -> b n (h e)"))


class Block(nn.Module):
    def __init__(self, config: G3PTConfig) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.width), Attention(config.width, config.num_heads)
        self.norm2, self.mlp = nn.LayerNorm(config.width), MLP(config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, past)
        return x + self.mlp(self.norm2(x))


@register(
    "g3pt",
    task="generate-shape",
    input="tokens",
    paper="arXiv 2409.06322",
    variants={
        "g3pt": (214_250_240, {}),
        "g3pt_large": (1_424_582_912, {"width": 1536, "depth": 40, "num_heads": 16}),
    },
    small={
        "width": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
        "scales": (1, 4, 8),
        "bits": 5,
        "num_latents": 8,
        "latent_width": 16,
        "latent_heads": 2,
    },
)
class G3PT(nn.Module):
    """tokens (B, sum n_s), label (B,), context (B, l, D) -> logits (B, sum n_s, 2^d)."""

    taken: Tensor

    def __init__(self, config: G3PTConfig) -> None:
        super().__init__()
        self.config = config
        C, latent = config.width, config.latent_width
        self.code_out = nn.Linear(config.bits, latent) if config.bits != latent else nn.Identity()  # of the tokenizer
        self.up = nn.ModuleList(
            Querying(config.num_latents, latent, config.latent_heads) for _ in config.scales[:-1]
        )  # likewise; what the last scale adds is not needed here
        self.register_buffer("taken", torch.zeros((), dtype=torch.bool))  # whether these are a tokenizer's
        self.code_out.requires_grad_(False)
        self.up.requires_grad_(False)
        self.start = nn.Embedding(config.num_classes + 1, C)  # the last row: no label
        self.context_in = None if config.context_dim is None else nn.Linear(config.context_dim, C)
        self.feature_in = nn.Linear(latent, C)
        self.down = nn.ModuleList(Querying(count, C, config.num_heads) for count in config.scales[1:])
        self.scale = nn.Parameter(0.02 * torch.randn(len(config.scales), C))
        self.position = nn.Parameter(0.02 * torch.randn(sum(config.scales), C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 2**config.bits)

    def take_quantizer(self, tokenizer: G3PTTokenizer) -> None:
        """The tokenizer's weights that turn tokens into features. Raises TersorError where the two do not fit."""
        own, other = self.config, tokenizer.config
        for name, theirs in (
            ("scales", "scales"),
            ("bits", "bits"),
            ("num_latents", "num_latents"),
            ("latent_width", "width"),
        ):
            if getattr(own, name) != getattr(other, theirs):
                raise TersorError(
                    f"g3pt's {name} {getattr(own, name)} is not the tokenizer's {theirs} {getattr(other, theirs)}"
                )
        if own.latent_heads != other.num_heads:
            raise TersorError(
                f"g3pt's latent_heads {own.latent_heads} is not the tokenizer's num_heads {other.num_heads}"
            )
        self.code_out.load_state_dict(tokenizer.quantizer.lfq.project_out.state_dict())
        for own_up, up in zip(self.up, tokenizer.quantizer.up, strict=False):
            own_up.load_state_dict(up.state_dict())
        self.taken.fill_(True)

    def forward(self, tokens: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Teacher forcing: the logits of each scale, given the scales before it. tokens of the last scale do not count."""
        if tokens.shape[1] != sum(self.config.scales):
            raise TersorError(
                f"this g3pt takes {sum(self.config.scales)} tokens of all its scales, not {tokens.shape[1]}"
            )
        label, context = self._conditions(tokens.shape[0], label, context, drop=self.training)
        front = self.front(label, context)
        parts = [self.first(label)]
        total = None
        for s, part in enumerate(torch.split(tokens, list(self.config.scales), 1)[:-1]):
            h = self.contribution(s, part)
            total = h if total is None else total + h
            parts.append(self.embed(s + 1, total))
        x = torch.cat((front, *parts), 1)
        mask = self.mask(front.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, front.shape[1] :]))

    def loss(self, tokens: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Scalar: cross-entropy, mean over all tokens of all scales."""
        self.check_label(label)
        return F.cross_entropy(self(tokens, label, context).flatten(0, 1).float(), tokens.flatten())

    @torch.no_grad()
    def generate(
        self,
        label: Tensor | None = None,
        context: Tensor | None = None,
        *,
        samples: int = 1,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, sum n_s) tokens. samples: B, where neither label nor context says it. top_k 0: all codes; temperature 0: the
        likeliest. generator: on the CPU, so that a seed means the same on every device."""
        self.check_label(label)
        B = next((len(given) for given in (label, context) if given is not None), samples)
        label, context = self._conditions(B, label, context, drop=False)
        guided = guidance != 1
        if guided:
            label = torch.cat((torch.full_like(label, self.config.num_classes), label))
            context = None if context is None else torch.cat((torch.zeros_like(context), context))
        pasts = [Past() for _ in self.blocks]
        total: Tensor | None = None
        x = torch.cat((self.front(label, context), self.first(label)), 1)
        found: list[Tensor] = []
        for s, count in enumerate(self.config.scales):
            for index, block in enumerate(self.blocks):
                # the front sees no scale, as in the mask
                x = block(x, self._first_mask(x.shape[1], x.device) if s == 0 else None, pasts[index])
            logits = self.head(self.norm(x[:, -count:])).float()
            if guided:
                without, towards = logits.chunk(2)
                logits = without + guidance * (towards - without)
            found.append(draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
            if s + 1 < len(self.config.scales):
                h = self.contribution(s, found[-1])
                total = h if total is None else total + h
                x = self.embed(s + 1, torch.cat((total, total)) if guided else total)
        return torch.cat(found, 1)

    def contribution(self, scale: int, tokens: Tensor) -> Tensor:
        """h of the scale's tokens (B, n_s): (B, L, latent_width), as the tokenizer computes it."""
        return self.up[scale](self.code_out(to_codes(tokens, self.config.bits).to(self.position.dtype)))

    def check_label(self, label: Tensor | None) -> None:
        classes = self.config.num_classes
        if label is not None and classes and not 0 <= int(label.min()) <= int(label.max()) < classes:
            raise TersorError(f"this g3pt's labels are 0 to {classes - 1}, not {label.tolist()}")

    def front(self, label: Tensor, context: Tensor | None) -> Tensor:
        """What stands before the scales: (B, 1 + l, C)."""
        start = self.start(label)[:, None]
        return start if context is None or self.context_in is None else torch.cat((start, self.context_in(context)), 1)

    def first(self, label: Tensor) -> Tensor:
        """e_1 (B, n_1, C)."""
        return self.start(label)[:, None] + self.scale[0] + self.position[: self.config.scales[0]]

    def embed(self, s: int, total: Tensor) -> Tensor:
        """e of scale s > 0 from Zhat (B, L, C) of those before: (B, n_s, C)."""
        begin = sum(self.config.scales[:s])
        where = self.position[begin : begin + self.config.scales[s]]
        return self.down[s - 1](self.feature_in(total)) + self.scale[s] + where

    def mask(self, front: int, device: torch.device) -> Tensor:
        """(N, N) True where the row's token sees the column's."""
        sizes = (front, *self.config.scales)
        block = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)], device=device)
        return block[:, None] >= block[None, :]

    def _first_mask(self, length: int, device: torch.device) -> Tensor:
        front = length - self.config.scales[0]
        return self.mask(front, device)[:length, :length]

    def _conditions(
        self, B: int, label: Tensor | None, context: Tensor | None, *, drop: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The label or none, and the context or zeros; with `drop` some are left out."""
        config, device = self.config, self.position.device
        if label is not None and not config.num_classes:
            raise TersorError("this g3pt has num_classes 0 and takes no label")
        if (context is not None) != (config.context_dim is not None):
            raise TersorError(
                "this g3pt takes no context, its context_dim is None"
                if config.context_dim is None
                else f"this g3pt needs a context (batch, length, {config.context_dim})"
            )
        none = torch.full((B,), config.num_classes, device=device)
        label = none if label is None else label
        if drop and config.condition_dropout > 0:
            left_out = torch.rand(B, device=device) < config.condition_dropout
            label = torch.where(left_out, none, label)
            context = None if context is None else context * ~left_out[:, None, None]
        return label, context

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        inputs = {"tokens": torch.randint(2**config.bits, (batch_size, sum(config.scales)))}
        if config.num_classes:
            inputs["label"] = torch.arange(batch_size) % config.num_classes
        if config.context_dim is not None:
            inputs["context"] = torch.randn(batch_size, 5, config.context_dim)
        return inputs


def draw(
    logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Logits (B, n, V) -> (B, n) codes."""
    if temperature <= 0:
        return logits.argmax(-1)
    values, order = (logits / temperature).sort(-1, descending=True)
    p = values.softmax(-1)
    kept = p.cumsum(-1) - p < top_p  # the likeliest always stays
    if top_k > 0:
        kept[..., top_k:] = False
    p = torch.where(kept, p, 0.0)
    chosen = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=generator).to(logits.device)
    return order.gather(-1, chosen.view(*p.shape[:2], 1))[..., 0]
