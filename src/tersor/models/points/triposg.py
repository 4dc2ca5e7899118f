"""TripoSG's rectified-flow transformer (Li et al. 2025, arXiv 2502.06608): a shape from one picture.

What it is for: 3D meshes from a picture. A set of latent tokens is drawn by following this model's velocity from noise; the
VAE (`triposg_vae`) turns the tokens into a signed distance, and that into a mesh.

    model = tersor.models.create("triposg", width=64, num_layers=3, num_attention_heads=4, cross_attention_dim=16)
    flow = RectifiedFlow(FlowConfig())                                            # tersor.train.rectified_flow
    latents = flow.sample(model, torch.randn(1, 32, 64), torch.randn(1, 8, 16), steps=4)   # (1, 32, 64)

From a folder with the published layout: `tersor sample DIR --condition picture.png --out shape.glb`.

hidden_states (B, N, C) latents, timestep (B,) in 0..1000, encoder_hidden_states (B, L, D) context (DINOv2-large, D 1024) ->
velocity x0 - noise (B, N, C). With W the width:

    z = [MLP(sinusoids(t)) | W_in x]                       (B, N + 1, W): the time is one more token; no positions
    z = LN(W_skip [skip | z])                              in the second half; skips come from the first half, last in, first out
    z = z + A(LN(z))                                       q and k of each head through an RMS norm
    z = z + s1 A(LN1(z), context) + s2 A(LN2(z), context2) the second context only with `use_cross_attention_2`
    z = z + W2 GELU(W1 LN(z))                              hidden 4W
    v = W_out LN(z)                                        without the time token

Quirks, as published. Heads are cut from [q | k | v] as a whole: head h takes channels 3hd to 3(h+1)d of it for its q, k and v (in
attention to a context 2hd to 2(h+1)d of [k | v]). The skip's norm comes after its linear map. With an even number of blocks
the first skip is never used.

Mixture of experts (`moe_layers`, from the paper; no code or weights are public): in the last so many blocks each token goes to
`experts_per_token` of `num_experts` networks of the dense one's size, chosen and weighed by softmax gates that are made to sum
to 1, and to a shared one beside them. `balance_loss(model)` after a training call is the mean over these blocks of
E * sum_e (share of choices of e) * (mean gate of e): 1 for uniform routing, up to E / (experts a token) where all tokens
choose the same (Fedus et al., arXiv 2101.03961). `mixture_from_dense(model)` starts one from dense weights: each expert is
a copy, and the shared one's last map is zero, so that it computes what the dense model does (how the paper starts the
shared one is not known).

Origin: VAST-AI-Research/TripoSG at fc5c409, MIT, parts derived from Tencent HunyuanDiT (see its NOTICE); written anew. Its
`transformer/` folder loads without a key map.

Proven: the golden cases (one and two contexts, odd and even depth, the published width), the parameter count, the mixture's
properties; it learned the tokens of five shapes (benchmarks/results/shapes.md). Not proven: the published quality
(Normal-FID 3.36 in its best ablation), the 4B mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.models.points.triposg_vae import FeedForward
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class TripoSGConfig:
    num_attention_heads: int = 16
    width: int = 2048  # W
    in_channels: int = 64  # C
    num_layers: int = 21
    cross_attention_dim: int = 1024  # D
    use_cross_attention_2: bool = False
    cross_attention_2_dim: int | None = None
    moe_layers: int = 0  # the last so many blocks have experts; the paper's 4B model: 6
    num_experts: int = 8
    experts_per_token: int = 2

    def __post_init__(self) -> None:
        at_least("triposg", 1, in_channels=self.in_channels, num_layers=self.num_layers)
        at_least("triposg", 1, cross_attention_dim=self.cross_attention_dim)
        divides("triposg", "num_attention_heads", self.num_attention_heads, "width", self.width)
        divides("triposg", "two, for sines and cosines,", 2, "width", self.width)
        if self.use_cross_attention_2 != (self.cross_attention_2_dim is not None):
            raise TersorError(
                "triposg has use_cross_attention_2 and a cross_attention_2_dim, or neither; "
                f"not {self.use_cross_attention_2} and {self.cross_attention_2_dim}"
            )
        if not 0 <= self.moe_layers <= self.num_layers:
            raise TersorError(f"triposg's moe_layers is 0 to num_layers {self.num_layers}, not {self.moe_layers}")
        if self.moe_layers and not 1 <= self.experts_per_token <= self.num_experts:
            raise TersorError(
                f"triposg sends a token to 1 to num_experts {self.num_experts} experts, not {self.experts_per_token}"
            )


class LayerNorm(nn.LayerNorm):
    """Computed in float32 at least, whatever the type of z."""

    def forward(self, z: Tensor) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)
        return F.layer_norm(z.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps).to(
            z.dtype
        )


class Attention(nn.Module):
    """z (B, N, W) to itself, or to a context (B, L, D)."""

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads, keys = heads, width if context_dim is None else context_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(keys, width, bias=False)
        self.to_v = nn.Linear(keys, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        # one cut through the joined maps, see Quirks
        if context is None:
            joined = torch.cat((self.to_q(z), self.to_k(z), self.to_v(z)), -1)
            q, k, v = rearrange(joined, "b n (h c) -> b h n c", h=self.heads).chunk(3, -1)
        else:
            q = rearrange(self.to_q(z), "b n (h c) -> b h n c", h=self.heads)
            joined = torch.cat((self.to_k(context), self.to_v(context)), -1)
            k, v = rearrange(joined, "b n (h c) -> b h n c", h=self.heads).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.to_out[0](rearrange(mixed, "b h n c -> b n (h c)"))


class Mixture(nn.Module):
    """z (B, N, W): each token through its experts, weighed, plus the shared one."""

    def __init__(self, config: TripoSGConfig) -> None:
        super().__init__()
        self.per_token = config.experts_per_token
        self.gate = nn.Linear(config.width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config.width) for _ in range(config.num_experts))
        self.shared = FeedForward(config.width)
        self.balance: Tensor | None = None  # of the last call in training mode

    def forward(self, z: Tensor) -> Tensor:
        tokens = z.flatten(0, 1)  # (M, W)
        gates = self.gate(tokens).softmax(-1)  # (M, E)
        weights, chosen = gates.topk(self.per_token, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            share = F.one_hot(chosen, len(self.experts)).to(gates).mean((0, 1))
            self.balance = len(self.experts) * (share * gates.mean(0)).sum()
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, rows, weights[rows, place, None] * expert(tokens[rows]))
        return self.shared(z) + mixed.view_as(z)


class Block(nn.Module):
    def __init__(self, config: TripoSGConfig, *, skip: bool, mixture: bool) -> None:
        super().__init__()
        w, heads = config.width, config.num_attention_heads
        if skip:
            self.skip_linear, self.skip_norm = nn.Linear(2 * w, w), LayerNorm(w)
        self.norm1, self.attn1 = LayerNorm(w), Attention(w, heads)
        self.norm2, self.attn2 = LayerNorm(w), Attention(w, heads, config.cross_attention_dim)
        if config.cross_attention_2_dim is not None:
            self.norm2_2, self.attn2_2 = LayerNorm(w), Attention(w, heads, config.cross_attention_2_dim)
        self.norm3, self.ff = LayerNorm(w), Mixture(config) if mixture else FeedForward(w)

    def forward(
        self,
        z: Tensor,
        context: Tensor,
        context_2: Tensor | None = None,
        skip: Tensor | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        if skip is not None:
            z = self.skip_norm(self.skip_linear(torch.cat((skip, z), -1)))
        z = z + self.attn1(self.norm1(z))
        seen = scales[0] * self.attn2(self.norm2(z), context)
        if context_2 is not None:
            seen = seen + scales[1] * self.attn2_2(self.norm2_2(z), context_2)
        z = z + seen
        return z + self.ff(self.norm3(z))


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.width // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * k / half)
        return self.linear_2(F.gelu(self.linear_1(torch.cat((angles.sin(), angles.cos()), -1).to(dtype))))


@register(
    "triposg",
    task="generate-shape",
    input="latents",
    paper="arXiv 2502.06608",
    variants={"triposg": (1_439_556_160, {})},
    small={"width": 32, "num_layers": 3, "num_attention_heads": 4, "in_channels": 8, "cross_attention_dim": 24},
)
class TripoSG(nn.Module):
    """hidden_states (B, N, C), timestep (B,), encoder_hidden_states (B, L, D) -> velocity (B, N, C)."""

    def __init__(self, config: TripoSGConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.num_layers
        self.time_proj = TimeEmbedding(config.width)
        self.proj_in = nn.Linear(config.in_channels, config.width)
        self.blocks = nn.ModuleList(
            Block(config, skip=i > depth // 2, mixture=i >= depth - config.moe_layers) for i in range(depth)
        )
        self.norm_out = LayerNorm(config.width)
        self.proj_out = nn.Linear(config.width, config.in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor | None = None,
        cross_attention_scale: float = 1.0,
        cross_attention_2_scale: float = 1.0,
    ) -> Tensor:
        self.check(hidden_states, encoder_hidden_states, encoder_hidden_states_2)
        x = self.proj_in(hidden_states)
        z = torch.cat((self.time_proj(timestep, x.dtype)[:, None], x), 1)  # (B, N + 1, W)
        skips: list[Tensor] = []
        middle = self.config.num_layers // 2
        scales = (cross_attention_scale, cross_attention_2_scale)
        for index, block in enumerate(self.blocks):
            skip = skips.pop() if index > middle else None
            z = block(z, encoder_hidden_states, encoder_hidden_states_2, skip, scales)
            if index < middle:
                skips.append(z)
        return self.proj_out(self.norm_out(z)[:, 1:])

    def check(self, x: Tensor, context: Tensor, context_2: Tensor | None) -> None:
        config = self.config
        if x.dim() != 3 or x.shape[-1] != config.in_channels:
            raise TersorError(f"this triposg takes latents (batch, tokens, {config.in_channels}), not {list(x.shape)}")
        pairs = [("context", context, config.cross_attention_dim)]
        if (context_2 is None) != (config.cross_attention_2_dim is None):
            raise TersorError(
                f"this triposg has {1 if config.cross_attention_2_dim is None else 2} contexts; "
                f"{1 if context_2 is None else 2} came"
            )
        if context_2 is not None and config.cross_attention_2_dim is not None:
            pairs.append(("second context", context_2, config.cross_attention_2_dim))
        for name, given, d in pairs:
            if given.dim() != 3 or given.shape[0] != x.shape[0] or given.shape[-1] != d:
                raise TersorError(f"this triposg takes a {name} ({len(x)}, length, {d}), not {list(given.shape)}")

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        inputs = {
            "hidden_states": torch.randn(batch_size, 12, config.in_channels),
            "timestep": 1000 * torch.rand(batch_size),
            "encoder_hidden_states": torch.randn(batch_size, 7, config.cross_attention_dim),
        }
        if config.cross_attention_2_dim is not None:
            inputs["encoder_hidden_states_2"] = torch.randn(batch_size, 5, config.cross_attention_2_dim)
        return inputs


def balance_loss(model: nn.Module) -> Tensor:
    """Scalar: mean balance of the mixtures in `model` in their last training call. Raises TersorError where there is none."""
    found = [module.balance for module in model.modules() if isinstance(module, Mixture) and module.balance is not None]
    if not found:
        raise TersorError("no mixture of experts was called in training mode: set moe_layers, and model.train()")
    return torch.stack(found).mean()


def mixture_from_dense(
    model: TripoSG, *, moe_layers: int = 6, num_experts: int = 8, experts_per_token: int = 2
) -> TripoSG:
    """A mixture that computes what the dense `model` does: experts are copies, the shared one adds nothing yet."""
    if model.config.moe_layers:
        raise TersorError(f"the model has experts in {model.config.moe_layers} blocks already; give a dense one")
    wanted = replace(model.config, moe_layers=moe_layers, num_experts=num_experts, experts_per_token=experts_per_token)
    state = model.state_dict()
    mixture = TripoSG(wanted).to(next(model.parameters()))
    for key, value in mixture.state_dict().items():
        parts = key.split(".")
        if "experts" in parts or "shared" in parts:
            start = parts.index("ff") + 1
            parts = parts[:start] + parts[parts.index("net") :]
        if ".gate." not in key:
            value.copy_(state[".".join(parts)])
        if ".shared.net.2." in key:
            value.zero_()
    return mixture.train(model.training)
