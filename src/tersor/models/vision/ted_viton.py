"""TED-VITON, virtual try-on with the transformer of Stable Diffusion 3 (Wan et al. 2024, arXiv 2411.17017).

What it is for: a picture of a garment and a picture of a person give the person in that garment, with logos and text that stay
legible. There is no public code and there are no weights: this is built from the paper, on the base `sd3`, and has to be trained.

    model = tersor.models.create("ted_viton")
    model.load_base("stable-diffusion-3-medium-diffusers/transformer")
    v = model(hidden_states, encoder_hidden_states, pooled_projections, timestep, garment=latents, semantics=features)

tersor.train.try_on has the losses (try-on, text preservation) and the sampler. With C = 16 channels of SD3's latents:

    try-on net   sd3 on 2 C + 1 more channels: [noised latents, mask, masked person, pose]; the added channels start at zero
    garment net  sd3 on the clean garment's latents with the garment's text at timestep 0, frozen
    attention    of each block's try-on tokens sees the tokens with which the garment net enters the same block, too:
                 softmax over [try-on, garment, text]; the garment's own results are not computed
    GS-Adapter   s = resampler(features of an image encoder), K tokens;  the image queries' result of the joint attention
                 + ip_scale * softmax(Q (W_k s)^T / sqrt(e)) W_v s        W_k, W_v new in each block, W_v starts at zero

So at the start, without a garment, the try-on net is the base to the last bit of rounding. `garment_mask` (B, G) leaves garment
tokens out, all of a sample's where it has no garment. Trained are the try-on net, the adapter and its resampler.

What the paper leaves open was decided so: garment tokens are those entering a block, before its norm, and get the try-on net's
modulation and projections; the garment is seen at timestep 0; the resampler is that of IP-Adapter Plus, on the hidden states of
OpenCLIP's ViT-bigG (1664), with 16 tokens; ip_scale is 1.

Origin: github.com/ZhenchenWan/TED-VITON (a web page), no code. Names are those of diffusers' SD3 below `tryon` and `garment`, and
IP-Adapter's `{block}.to_k_ip.weight` below `adapter`.

Proven: the base's golden case and diffusers' outputs (see sd3). By properties: equal to the base at the start; affine in
ip_scale; garment tokens in any order; a masked garment is none; the text loss is zero at the start and does not touch the
frozen copy; only the trained parts move; trained on squares of two colours, it dresses rectangles in the garment's colour.
Not proven: anything on VITON-HD or DressCode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.models.key_maps import drop
from tersor.models.loading import load_state, read_state
from tersor.models.registry import register
from tersor.models.vision.sd3 import SD3, Block, Condition, PatchEmbed, SD3Config, Streams


@dataclass(frozen=True, kw_only=True)
class TEDVITONConfig:
    base: SD3Config = field(default_factory=SD3Config)  # of both nets; its in_channels are C
    image_dim: int = 1664  # width of the image encoder's hidden states
    adapter_tokens: int = 16  # K
    adapter_dim: int = 1280  # width of the resampler
    adapter_depth: int = 4
    adapter_heads: int = 20
    ip_scale: float = 1.0  # weight of the adapter's attention

    def __post_init__(self) -> None:
        divides("ted_viton", "adapter_heads", self.adapter_heads, "adapter_dim", self.adapter_dim)
        at_least("ted_viton", 1, image_dim=self.image_dim, adapter_tokens=self.adapter_tokens)
        at_least("ted_viton", 1, adapter_depth=self.adapter_depth)
        at_least("ted_viton", 2, num_layers=self.base.num_layers)
        if self.base.in_channels != self.base.out_channels:
            raise TersorError(
                f"ted_viton's base has as many channels in as out, not {self.base.in_channels} and {self.base.out_channels}"
            )

    @property
    def tryon(self) -> SD3Config:
        return replace(self.base, in_channels=3 * self.base.in_channels + 1)


class GarmentNet(nn.Module):
    """The base up to where its last block begins: the image tokens with which each block is entered."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = Condition(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.transformer_blocks = nn.ModuleList(Block(config, i, last=False) for i in range(config.num_layers - 1))

    def forward(self, garment: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> list[Tensor]:
        """Latents (B, C, H, W) and the garment's text -> for each block of the base (B, G, D)."""
        x, y = self.pos_embed(garment), self.context_embedder(encoder_hidden_states)
        c = self.time_text_embed(garment.new_zeros(garment.shape[0]), pooled_projections)
        entered = [x]
        for block in self.transformer_blocks:
            x, y = block(x, y, c)
            entered.append(x)
        return entered


class ResamplerLayer(nn.Module):
    """Queries collect from the features and from each other, then an MLP."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.to_q, self.to_kv = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.to_out = nn.Linear(d, d, bias=False)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        features, own = self.norm1(features), self.norm2(queries)
        q = rearrange(self.to_q(own), "b n (h e) -> b h n e", h=self.heads)
        k, v = rearrange(self.to_kv(torch.cat((features, own), 1)), "b n (p h e) -> p b h n e", p=2, h=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)")
        queries = queries + self.to_out(mixed)
        return queries + self.fc2(F.gelu(self.fc1(self.norm3(queries))))


class Resampler(nn.Module):
    """Features of an image (B, L, image_dim) -> K tokens (B, K, D)."""

    def __init__(self, config: TEDVITONConfig) -> None:
        super().__init__()
        d = config.adapter_dim
        self.latents = nn.Parameter(torch.randn(1, config.adapter_tokens, d) * d**-0.5)
        self.proj_in, self.proj_out = nn.Linear(config.image_dim, d), nn.Linear(d, config.base.width)
        self.layers = nn.ModuleList(ResamplerLayer(d, config.adapter_heads) for _ in range(config.adapter_depth))
        self.norm_out = nn.LayerNorm(config.base.width)

    def forward(self, features: Tensor) -> Tensor:
        features, queries = self.proj_in(features), self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(features, queries)
        return self.norm_out(self.proj_out(queries))


class KeysValues(nn.Module):
    """One block's part of the adapter: K tokens (B, K, D) -> keys and values (B, K, D)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = (nn.Linear(d, d, bias=False) for _ in range(2))
        nn.init.zeros_(self.to_v_ip.weight)

    def forward(self, tokens: Tensor) -> Streams:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


@register(
    "ted_viton",
    task="try-on",
    input="latents",
    paper="arXiv 2411.17017",
    variants={"ted_viton": (4_193_786_688, {})},
    small={
        "base": {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "joint_attention_dim": 12,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 6,
        },
        "image_dim": 10,
        "adapter_tokens": 3,
        "adapter_dim": 16,
        "adapter_depth": 1,
        "adapter_heads": 2,
    },
)
class TEDVITON(nn.Module):
    """Noised latents and conditions (B, 3 C + 1, H, W), text, a garment -> velocity (B, C, H, W)."""

    def __init__(self, config: TEDVITONConfig) -> None:
        super().__init__()
        self.config = config
        self.tryon = SD3(config.tryon)
        self.garment = GarmentNet(config.base).requires_grad_(False)
        self.image_proj = Resampler(config)
        self.adapter = nn.ModuleList(KeysValues(config.base.width) for _ in range(config.base.num_layers))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        garment: Tensor | None = None,
        garment_hidden_states: Tensor | None = None,
        garment_pooled: Tensor | None = None,
        garment_mask: Tensor | None = None,
        semantics: Tensor | None = None,
    ) -> Tensor:
        """garment (B, C, h, w): its clean latents, with garment_hidden_states and garment_pooled as its text (left out: the
        same text as the person's). garment_mask (B, G), True: a patch of it that is seen. semantics (B, L, image_dim)."""
        beside, semantic = None, None
        if garment is not None:
            text = encoder_hidden_states if garment_hidden_states is None else garment_hidden_states
            beside = self.garment(garment, text, pooled_projections if garment_pooled is None else garment_pooled)
        elif garment_mask is not None:
            raise TersorError("ted_viton has a garment_mask but no garment that it could mask")
        if semantics is not None:
            tokens = self.image_proj(semantics)
            pairs = [part(tokens) for part in self.adapter]
            semantic = [(k, self.config.ip_scale * v) for k, v in pairs]
        return self.tryon(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, beside, garment_mask, semantic
        )

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        base = self.config.base
        garment = {
            "garment": torch.randn(batch_size, base.in_channels, base.sample_size, base.sample_size),
            "garment_hidden_states": torch.randn(batch_size, 5, base.joint_attention_dim),
            "garment_pooled": torch.randn(batch_size, base.pooled_projection_dim),
            "semantics": torch.randn(batch_size, 9, self.config.image_dim),
        }
        return {**self.tryon.example_inputs(batch_size), **garment}

    @torch.no_grad()
    def load_base(self, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
        """Copy SD3's weights, in diffusers' layout, into both nets; the try-on net's added channels become zero."""
        state = read_state(checkpoint) if isinstance(checkpoint, (str, Path)) else dict(checkpoint)
        state = drop(state, r"^pos_embed\.pos_embed$")
        name, C = "pos_embed.proj.weight", self.config.base.in_channels
        if name in state and state[name].dim() == 4 and state[name].shape[1] == C:
            patches = state[name]
            wide = patches.new_zeros(patches.shape[0], self.config.tryon.in_channels, *patches.shape[2:])
            wide[:, :C] = patches
            load_state(self.tryon, {**state, name: wide}, what="ted_viton's try-on net cannot take this base")
            own = {key: value for key, value in state.items() if key in self.garment.state_dict()}
            load_state(self.garment, own, what="ted_viton's garment net cannot take this base")
            return
        found = list(state[name].shape) if name in state else "absent"
        raise TersorError(f"ted_viton's base has {name} for {C} channels; in this checkpoint it is {found}")

    @torch.no_grad()
    def prior(self) -> SD3:
        """A frozen copy of the try-on net as it is now, on C channels alone: the base, if taken before training."""
        net = SD3(self.config.base)
        C = self.config.base.in_channels
        state = copy.deepcopy(self.tryon.state_dict())
        state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"][:, :C]
        net.load_state_dict(state)
        first = next(self.parameters())
        return net.to(first.device, first.dtype).eval().requires_grad_(False)
