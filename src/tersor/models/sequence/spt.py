"""The Transformer of "Never Train from Scratch" (Amos, Berant and Gupta, ICLR 2024, arXiv 2310.02980).

What it is for: classifying long sequences with a plain Transformer that was first trained to fill holes in the very same
sequences. The paper: from 54 to about 81 points on the Long Range Arena, 86 with rotary positions, S4's own score.

    model = tersor.models.create("spt_lra_image")
    logits = model(torch.rand(2, 1024, 1))                         # numbers (B, L, d_input), or tokens (B, L) with `vocab`
    logits = model(x, lengths=lengths)                             # each averaged over its own length

`tersor.train.self_pretraining` trains it (and S4) to fill holes, then to classify; `tersor train lra/image --model
spt_lra_image --pretrain-epochs 50` does both.

    x = E u + P                                        E: Linear or Embedding; P: sinusoids, none with pos=False
    x = x + W_o A(LN x),  x = x + W_2 GELU(W_1 LN x)   n_layers times; hidden expand d_model; GELU exact
    logits = W mean_t LN x + b                         pool="mean"; with pool="none" at every position, as pretraining asks
    logits = MLP [e, e', e e', e - e']                 retrieval: of two sequences' means, the first halves' and the second's

A is softmax(q k^T / sqrt(d / heads)) v of biased Linears; with `rotary` the pairs (2m, 2m + 1) of q and k turn by
t 10000^(-2m/d_head). With `local_block` a position sees its own block of that length and the block on either side
(published: 4096, from 16,384 positions on). head="mlp" is Linear, ReLU, Linear.

Origin: IdoAmos/not-from-scratch at f919137 (MIT). Layers come in pairs, attention at 2i, feed-forward at 2i + 1; key names
are ours. Quirks: attention sees padding, only the average leaves it out; a denoising model of numbers has one input
channel more, the mask. Ours, for want of a source: `dropout` is on what each layer adds, the hidden width of head="mlp"
is d_model, the pairs' head is that of S4, and vocabularies are those of `tersor.data.long_range`.

Proven: the golden cases of the published code (pixels and tokens, masked and causal, the Image size), local attention
equal to full attention under its mask. Not proven: the published accuracies. On short ListOps, in eight minutes of a shared GPU,
pretraining for half of them left 36.9 % where training all along gave 43.4 % (benchmarks/results/sequence_proofs.md).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.positions import rotary_table, rotate, sinusoids
from tersor.models.key_maps import drop, rename
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class SPTConfig:
    vocab: int | None = None  # tokens; None: the input is numbers
    d_input: int = 1  # channels of numbers
    d_output: int = 10
    d_model: int = 64
    n_layers: int = 3  # pairs of attention and feed-forward
    heads: int = 4
    expand: int = 2  # hidden width of the feed-forward over d_model
    max_len: int = 1024  # longest sequence that gets sinusoids
    pos: bool = True  # sinusoids are added to the input
    rotary: bool = False
    causal: bool = False
    local_block: int = 0  # 0: every position sees all
    pool: str = "mean"  # "none": an output at every position
    head: str = "linear"  # "mlp"
    retrieval: bool = False  # pairs of sequences, the first members first in the batch
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("spt", 1, d_input=self.d_input, d_output=self.d_output, n_layers=self.n_layers, expand=self.expand)
        at_least("spt", 1, max_len=self.max_len)
        at_least("spt", 0, local_block=self.local_block)
        divides("spt", "heads", self.heads, "d_model", self.d_model)
        if self.rotary:
            divides("spt", "2 heads, as rotary needs,", 2 * self.heads, "d_model", self.d_model)
        one_of("spt", "pool", self.pool, ("mean", "none"))
        one_of("spt", "head", self.head, ("linear", "mlp"))
        if self.retrieval and (self.pool, self.head) != ("mean", "linear"):
            raise TersorError(
                f"spt's retrieval compares averages by its own head, not pool {self.pool}, head {self.head}"
            )
        if self.local_block and self.causal:
            raise TersorError(f"spt's local_block {self.local_block} does not go with causal attention")


class Attention(nn.Module):
    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        self.config = config
        self.linears = nn.ModuleList(nn.Linear(config.d_model, config.d_model) for _ in range(4))  # q, k, v, out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(linear(x), "b l (h d) -> b h l d", h=self.config.heads) for linear in self.linears[:3])
        if self.config.rotary:
            cos, sin = (table.to(x) for table in rotary_table(x.shape[1], q.shape[-1]))
            q, k = (rotate(each, cos, sin, interleaved=True) for each in (q, k))
        if self.config.local_block and x.shape[1] > self.config.local_block:
            y = local_attention(q, k, v, self.config.local_block)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)
        out: Tensor = self.linears[3](rearrange(y, "b h l d -> b l (h d)"))
        return out


def local_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """q, k, v (B, h, L, d) -> (B, h, L, d): each block of `block` positions sees itself and the blocks on either side."""
    L = q.shape[2]
    count = math.ceil(L / block)
    room = count * block - L
    q, k, v = (F.pad(each, (0, 0, 0, room)) for each in (q, k, v))
    q = rearrange(q, "b h (n s) d -> b h n s d", n=count)
    k, v = (F.pad(each, (0, 0, block, block)).unfold(2, 3 * block, block).transpose(-1, -2) for each in (k, v))
    places = torch.arange(-block, (count + 1) * block, device=q.device).unfold(0, 3 * block, block)  # (n, 3 block)
    seen = (places >= 0) & (places < L)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])  # (B, h, n, block, d)
    return rearrange(y, "b h n s d -> b h (n s) d")[:, :, :L]


class FeedForward(nn.Module):
    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        hidden = config.expand * config.d_model
        self.ff = nn.Sequential(nn.Linear(config.d_model, hidden), nn.GELU(), nn.Linear(hidden, config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ff(x)
        return out


class Residual(nn.Module):
    def __init__(self, layer: nn.Module, config: SPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.layer = layer
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.layer(self.norm(x)))
        return out


class Backbone(nn.Module):
    """x (B, L, d_model) -> (B, L, d_model)."""

    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Residual(kind(config), config) for _ in range(config.n_layers) for kind in (Attention, FeedForward)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


@register(
    "spt",
    task="classify",
    input="sequence",
    paper="arXiv 2310.02980",
    variants={
        "spt_lra_listops": (
            18_929_674,
            {"vocab": 18, "d_model": 512, "n_layers": 6, "heads": 8, "expand": 4, "max_len": 2000},
        ),
        "spt_lra_text": (
            19_048_962,
            {"vocab": 259, "d_output": 2, "d_model": 512, "n_layers": 6, "heads": 8, "expand": 4, "max_len": 4096},
        ),
        "spt_lra_retrieval": (
            892_418,
            {
                "vocab": 259,
                "d_output": 2,
                "d_model": 128,
                "n_layers": 4,
                "expand": 4,
                "max_len": 4000,
                "retrieval": True,
            },
        ),
        "spt_lra_image": (105_482, {"head": "mlp"}),
        "spt_lra_pathfinder": (399_106, {"d_output": 2, "d_model": 128, "n_layers": 4, "heads": 8, "expand": 1}),
        "spt_lra_pathx": (
            399_106,
            {
                "d_output": 2,
                "d_model": 128,
                "n_layers": 4,
                "heads": 8,
                "expand": 1,
                "max_len": 16384,
                "local_block": 4096,
            },
        ),
    },
    small={"d_model": 8, "n_layers": 2, "max_len": 32},
)
class SPT(nn.Module):
    """x: tokens (B, L), or numbers (B, L, d_input) -> logits (B, d_output); (B, L, d_output) with pool="none"."""

    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.encoder = nn.Linear(config.d_input, d) if config.vocab is None else nn.Embedding(config.vocab, d)
        self.model = Backbone(config)
        self.decoder = _decoder(config)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """lengths (B,): every sequence is averaged over its own."""
        h = self.encoder(x)
        if self.config.pos:
            if x.shape[1] > self.config.max_len:
                raise TersorError(f"this spt has positions for {self.config.max_len} elements, not for {x.shape[1]}")
            h = h + sinusoids(x.shape[1], h.shape[2]).to(h)
        h = self.model(h)
        if self.config.pool == "mean":
            h = h.mean(1) if lengths is None else _mean_of_each(h, lengths)
        if self.config.retrieval:
            first, second = h.chunk(2)
            h = torch.cat((first, second, first * second, first - second), -1)
        logits: Tensor = self.decoder(h)
        return logits

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        length = min(self.config.max_len, 64)
        batch_size *= 2 if self.config.retrieval else 1
        if self.config.vocab is None:
            return {"x": torch.randn(batch_size, length, self.config.d_input)}
        return {"x": torch.randint(self.config.vocab, (batch_size, length))}

    def pretraining_config(self, *, channels: int, outputs: int, length: int, causal: bool) -> SPTConfig:
        """Of the same backbone with `channels` of numbers in, and `outputs` at every position."""
        if causal != self.config.causal:
            raise TersorError(
                f"spt with causal={self.config.causal} is not pretrained on {'next elements' if causal else 'holes'}; "
                f"set causal={causal}"
            )
        at_each: dict[str, Any] = {"pool": "none", "head": "linear", "retrieval": False}
        return dataclasses.replace(self.config, d_input=channels, d_output=outputs, **at_each)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = drop(state, r"(^|\.)pos\.pe$")
        return rename(
            state,
            (r"\bnorm\.norm\.", "norm."),
            (r"\.ff\.0\.0\.", ".ff.0."),
            (r"^encoder\.0\.", "encoder."),
            (r"^decoder(\.0)?\.output_transform\.", "decoder."),
        )


def _mean_of_each(h: Tensor, lengths: Tensor) -> Tensor:
    """h (B, L, d) averaged over the first lengths (B,) positions: (B, d)."""
    inside = torch.arange(h.shape[1], device=h.device) < lengths[:, None]
    return (h * inside[..., None]).sum(1) / lengths[:, None]


def _decoder(config: SPTConfig) -> nn.Module:
    d = config.d_model
    if config.head == "linear" and not config.retrieval:
        return nn.Linear(d, config.d_output)
    return nn.Sequential(nn.Linear(4 * d if config.retrieval else d, d), nn.ReLU(), nn.Linear(d, config.d_output))
