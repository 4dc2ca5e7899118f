"""LifeGPT, a decoder that plays the Game of Life from its text alone (Berkovich and Buehler, 2024, arXiv 2409.12182).

What it is for: a clean test of what a small transformer can learn exactly. It reads a board as text and writes the next
one, without being told the board's size or that its edges wrap; every sample is made by rule (tersor.data.life), and
fed its own output it plays on (tersor.evaluate.life).

    model = tersor.models.load("lifegpt", "LifeGPT_epoch_50.pt")
    logits = model(input_ids)                                          # bytes (B, L) -> (B, L, 256)
    logits, state = model.prefill(input_ids)                           # the same, and what the model remembers
    logits, state = model.step(token, state)                           # token (B,) -> (B, 256)

    x = embedding(ids)                                                 (B, L, dim): no scale, no absolute positions
    x = x + W_o A(LN x)                                                A: causal, heads x attn_dim_head, scale d^-1/2
    x = x + W_2 GELU(W_1 LN x + b_1) + b_2                             depth times; GELU exact, hidden 4 dim
    logits = W LN x                                                    not tied to the embedding

The heads together are wider than the model (8 x 64 of 256). Of each head only the first max(attn_dim_head / 2, 32)
channels of q and k turn with the position, in pairs (i, i + half). LayerNorms have no bias. Neither text nor board has a
largest size: max_seq_len is the published data's length and changes nothing.

Forgetful causal masking is for training: in every sequence int(0.15 L) keys, never the first, are hidden from all
queries of all layers. `training_loss(model, input_ids)` draws them anew at each call:

    loss = tersor.models.text.lifegpt.training_loss(model, input_ids, forgetting=0.15)

Origin: lamm-mit/LifeGPT at b037a37 with x-transformers 1.27.21, Apache-2.0. Its key names are ours, less the prefix
`net.`; the later x-transformers' `gamma` is accepted.

Proven: the golden cases of the published code, its parameter count, cached steps equal to the whole sequence; trained on 8 x 8
boards in 7,067 steps, one cell of 693,824 is wrong on unseen boards (benchmarks/results/sequence_proofs.md). Not proven: the
published accuracies at 32 x 32, the released files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least
from tersor.layers.positions import rotary_table, rotate
from tersor.models.key_maps import drop, rename
from tersor.models.registry import register

LayerState = tuple[Tensor, Tensor]  # keys (turned) and values, each (B, heads, past, d)
State = list[LayerState]


@dataclass(frozen=True, kw_only=True)
class LifeGPTConfig:
    num_tokens: int = 256  # bytes
    max_seq_len: int = 2071  # of the published 32 x 32 boards
    dim: int = 256
    depth: int = 12
    heads: int = 8
    attn_dim_head: int = 64

    def __post_init__(self) -> None:
        at_least("lifegpt", 1, num_tokens=self.num_tokens, dim=self.dim, depth=self.depth, heads=self.heads)
        if self.attn_dim_head < 32 or self.attn_dim_head % 4:
            raise TersorError(f"lifegpt turns at least 32 channels of a head: attn_dim_head {self.attn_dim_head}")

    @property
    def rotary_dim(self) -> int:
        return max(self.attn_dim_head // 2, 32)


class Attention(nn.Module):
    def __init__(self, config: LifeGPTConfig) -> None:
        super().__init__()
        self.heads, self.rotary_dim = config.heads, config.rotary_dim
        inner = config.heads * config.attn_dim_head
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, state: LayerState | None, visible: Tensor | None) -> tuple[Tensor, LayerState]:
        """x (B, L, dim); visible (B, L), False where a key is hidden from all queries, its own too."""
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(project(x), "b l (h d) -> b h l d", h=self.heads) for project in projections)
        past = 0 if state is None else state[0].shape[2]
        q, k = self._turn(q, past), self._turn(k, past)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        allowed = None
        if state is not None or visible is not None:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
            if visible is not None:
                allowed = allowed & visible[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
        return self.to_out(rearrange(y, "b h l d -> b l (h d)")), (k, v)

    def _turn(self, x: Tensor, past: int) -> Tensor:
        cos, sin = (part.to(x)[past:] for part in rotary_table(past + x.shape[2], self.rotary_dim))
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((rotate(turned, cos, sin), rest), -1)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.ff = nn.Sequential(widen, nn.Identity(), nn.Linear(4 * dim, dim))  # published: a dropout of 0 between

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Decoder(nn.Module):
    """Attention and feed-forward by turns, each with its norm before it: layers.{n} = [[norm], block]."""

    def __init__(self, config: LifeGPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.ModuleList((nn.LayerNorm(config.dim, bias=False),)), block))
            for _ in range(config.depth)
            for block in (Attention(config), FeedForward(config.dim))
        )
        self.final_norm = nn.LayerNorm(config.dim, bias=False)

    def forward(self, x: Tensor, state: State | None, visible: Tensor | None) -> tuple[Tensor, State]:
        after: State = []
        layers: Iterable[Any] = self.layers
        for (norm,), block in layers:
            if isinstance(block, Attention):
                mixed, layer_state = block(norm(x), None if state is None else state[len(after)], visible)
                after.append(layer_state)
                x = x + mixed
            else:
                x = x + block(norm(x))
        return self.final_norm(x), after


class TokenEmbedding(nn.Module):
    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_tokens, dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.emb(input_ids)


@register(
    "lifegpt",
    task="language-model",
    input="tokens",
    paper="arXiv 2409.12182",
    variants={
        "lifegpt": (12_735_744, {}),
        "lifegpt_8x8": (4_332_800, {"depth": 4, "max_seq_len": 151}),
    },
    small={"dim": 32, "depth": 2, "heads": 2},
)
class LifeGPT(nn.Module):
    """input_ids (B, L) -> logits (B, L, num_tokens)."""

    def __init__(self, config: LifeGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_emb = TokenEmbedding(config.num_tokens, config.dim)
        self.attn_layers = Decoder(config)
        self.to_logits = nn.Linear(config.dim, config.num_tokens, bias=False)
        nn.init.kaiming_normal_(self.token_emb.emb.weight)

    def forward(self, input_ids: Tensor, visible: Tensor | None = None) -> Tensor:
        """visible (B, L), for training: False where a key is hidden. The first of a sequence must not be."""
        return self.to_logits(self.attn_layers(self.token_emb(input_ids), None, visible)[0])

    def prefill(
        self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        x, state = self.attn_layers(self.token_emb(input_ids), state, None)
        return self.to_logits(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, num_tokens) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.num_tokens, (batch_size, 24))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = drop(state, r"rotary_pos_emb\.inv_freq$", r"(0\.0|final_norm)\.beta$")
        return rename(state, (r"^net\.", ""), (r"\.gamma$", ".weight"))


def forgetful_mask(batch: int, length: int, forgetting: float, generator: torch.Generator | None = None) -> Tensor:
    """(batch, length): False at int(length * forgetting) places of each row, drawn anew, never the first."""
    if not 0 <= forgetting < 1:
        raise TersorError(f"forgetting is a share of the keys, 0 <= share < 1, not {forgetting}")
    hidden = min(int(length * forgetting), length - 1)
    order = torch.rand(batch, length - 1, generator=generator).argsort(-1)[:, :hidden] + 1
    return torch.ones(batch, length, dtype=torch.bool).scatter(1, order, False)


def training_loss(
    model: nn.Module, input_ids: Tensor, *, forgetting: float = 0.15, generator: torch.Generator | None = None
) -> Tensor:
    """Mean cross-entropy of every next token, prompt and all, with forgetful causal masking."""
    inputs, target = input_ids[:, :-1], input_ids[:, 1:]
    visible = None
    if forgetting:
        visible = forgetful_mask(len(inputs), inputs.shape[1], forgetting, generator).to(inputs.device)
    logits = model(inputs, visible)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
