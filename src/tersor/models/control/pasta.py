"""PASTA, small transformers pretrained on states and actions without rewards (Boige et al., RLC 2024, arXiv 2307.10936).

What it is for: a representation of an agent's state that was learned from recorded runs alone. It takes the raw state's
place in front of a policy or a critic, and fills in sensors that fail.

    model = tersor.models.create("pasta_c_bert", max_tokens=60, layers=3, hidden_size=64)
    loss = model.loss(model.tokens_of(states, actions))       # (B, k, n), (B, k, m): pretraining, by the model's objective
    policy = Policy(model, state_dim=n, act_dim=m, tune="probe")         # policy(states, actions[:, :-1]) -> (B, m)

Every number of every state and action is a token: with F the mu-law, K bins share [-1, 1] equally,

    F(x) = sign(x) log(mu |x| + 1) / log(mu M + 1),   id = floor(K (F + 1) / 2),  |F| above 1 cut, the last bin closed
    s_0^1 ... s_0^n a_0^1 ... a_0^m s_1^1 ...         component i of state t at place (n + m) t + i

and NaN, a failed sensor, is the mask token K. All domains, whatever n and m, share one vocabulary. The network is tokens
plus learned positions, L times x + attention(LN x), x + MLP(LN x) (GELU, 4 d), LN, and a linear map to K logits.

    C-GPT   causal; cross entropy of each next token
    C-BERT  both ways; 15 % of the tokens are asked for: 80 % of these become the mask token, 10 % another one, 10 % stay
    C-MTM   both ways; the share that is asked for is drawn anew for each sequence, and all of it masked

Downstream, T(s) is the last layer's output at the tokens of the newest state: their mean, or all n beside each other.
Policy puts an MLP (2 x 256, ReLU) on it and trains that alone ("probe"), the last block too ("last-layer"), or all ("full").

Origin: no code is published. What the paper leaves open is ours: mu = 100, M = 256, K = 1024 (Gato's), 8 layers of 256
in 4 heads (10 of them would exceed the 7 million parameters that it names), biases, positions counted from the start of a
chunk. Missing: tokens of whole states and actions, the objective of SMART, IQL.

Proven (there are no published numbers to compare with): round trip and order of the tokenizer, the layout, causality, the
shares of masked tokens and that no other counts in the loss, parameters below 7 million; on a linear system the next state is
known by more than a nat while actions stay at their policy's entropy; with a failed sensor a linear probe on T(s) imitates the
controller better than one on s. Pretrained, it imitates a controller better than the same network from scratch, and far worse
than an MLP on the numbers themselves (benchmarks/results/pasta.md). Not proven: any result of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.registry import register

CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1  # C-BERT's shares
TUNE = ("probe", "last-layer", "full")


@dataclass(frozen=True, kw_only=True)
class PastaConfig:
    objective: str = "gpt"  # or "bert", "mtm"
    bins: int = 1024  # K
    mu: float = 100.0
    largest: float = 256.0  # M: what F brings to 1
    max_tokens: int = 512  # positions
    hidden_size: int = 256  # d
    layers: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        one_of("pasta", "objective", self.objective, ("gpt", "bert", "mtm"))
        at_least("pasta", 2, bins=self.bins, max_tokens=self.max_tokens)
        at_least("pasta", 1, layers=self.layers)
        if not (self.mu > 0 and self.largest > 0):
            raise TersorError(f"pasta's mu and largest are positive, not {self.mu} and {self.largest}")
        divides("pasta", "heads", self.heads, "hidden_size", self.hidden_size)


def encode(x: Tensor, config: PastaConfig) -> Tensor:
    """Numbers of any shape -> tokens 0 to K - 1; NaN -> K."""
    law = x.sign() * (x.abs() * config.mu + 1).log() / math.log(config.largest * config.mu + 1)
    ids = ((law.clamp(-1, 1) + 1) / 2 * config.bins).floor().nan_to_num(config.bins)
    return torch.where(x.isnan(), config.bins, ids.long().clamp(max=config.bins - 1))


def decode(ids: Tensor, config: PastaConfig) -> Tensor:
    """Tokens -> the middle of their bins, under F's inverse; K -> NaN."""
    law = (ids + 0.5) / config.bins * 2 - 1
    x = law.sign() * ((law.abs() * math.log(config.largest * config.mu + 1)).exp() - 1) / config.mu
    return torch.where(ids == config.bins, torch.nan, x)


def masked_tokens(tokens: Tensor, config: PastaConfig) -> tuple[Tensor, Tensor]:
    """tokens [B, L] -> what the network is given, and which are asked for, by the objective; at least one a sequence.

    Drawn with torch's random numbers. A failed sensor's token is not asked for.
    """
    known = tokens != config.bins
    draw = torch.rand(tokens.shape, device=tokens.device)
    if config.objective == "mtm":
        chosen = draw < torch.rand(len(tokens), 1, device=tokens.device)
    else:
        chosen = draw < CHOSEN
    least = draw.masked_fill(~known, 2).argmin(1, keepdim=True)
    chosen = chosen.scatter(1, least, value=True) & known
    if config.objective == "mtm":
        return tokens.masked_fill(chosen, config.bins), chosen
    how = torch.rand(tokens.shape, device=tokens.device)
    given = tokens.masked_fill(chosen & (how < MASKED), config.bins)
    other = torch.randint(config.bins, tokens.shape, device=tokens.device)
    return torch.where(chosen & (how >= MASKED) & (how < MASKED + REPLACED), other, given), chosen


class Block(nn.Module):
    """x [B, L, d] -> [B, L, d]."""

    def __init__(self, config: PastaConfig) -> None:
        super().__init__()
        d, self.heads, self.causal = config.hidden_size, config.heads, config.objective == "gpt"
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(rearrange(y, "b h n d -> b n (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@register(
    "pasta",
    task="act",
    input="states",
    paper="arXiv 2307.10936",
    variants={
        "pasta_c_gpt": (6_975_232, {}),
        "pasta_c_bert": (6_975_232, {"objective": "bert"}),
        "pasta_c_mtm": (6_975_232, {"objective": "mtm"}),
    },
    small={"bins": 32, "max_tokens": 20, "hidden_size": 16, "layers": 2, "heads": 2},
)
class Pasta(nn.Module):
    """tokens [B, L] -> logits [B, L, K]."""

    def __init__(self, config: PastaConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed = nn.Embedding(config.bins + 1, d)
        self.position = nn.Embedding(config.max_tokens, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.bins)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, d], after the last norm."""
        length = tokens.shape[1]
        if length > self.config.max_tokens:
            raise TersorError(
                f"pasta has positions for {self.config.max_tokens} tokens, not {length}; a chunk of k steps has k (n + m)"
            )
        x = self.embed(tokens) + self.position(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens_of(self, states: Tensor, actions: Tensor) -> Tensor:
        """states [B, k, n], actions [B, k, m] -> [B, k (n + m)]; with actions [B, k - 1, m] the newest state is last."""
        (batch, steps, n), m = states.shape, actions.shape[2]
        if actions.shape[0] != batch or actions.shape[1] not in (steps, steps - 1):
            raise TersorError(
                f"pasta takes actions of {batch} runs of {steps} or {steps - 1} steps, not {list(actions.shape)}"
            )
        whole = torch.full((batch, steps, n + m), torch.nan, dtype=states.dtype, device=states.device)
        whole[:, :, :n] = states
        whole[:, : actions.shape[1], n:] = actions
        return encode(whole.flatten(1), self.config)[:, : steps * n + actions.shape[1] * m]

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy, nats a token, by the model's objective."""
        if self.config.objective == "gpt":
            logits, wanted = self(tokens)[:, :-1], tokens[:, 1:]
            known = wanted != self.config.bins
            return F.cross_entropy(logits[known], wanted[known])
        given, chosen = masked_tokens(tokens, self.config)
        return F.cross_entropy(self(given)[chosen], tokens[chosen])

    def represent(self, states: Tensor, actions: Tensor, *, pool: str = "mean") -> Tensor:
        """T(s) of the newest state: states [B, k, n], actions [B, k - 1, m] -> [B, d], or [B, n d] with pool="concat"."""
        one_of("pasta", "pool", pool, ("mean", "concat"))
        n = states.shape[2]
        of_state = self.hidden(self.tokens_of(states, actions[:, : states.shape[1] - 1]))[:, -n:]
        return of_state.mean(1) if pool == "mean" else of_state.flatten(1)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"tokens": torch.randint(self.config.bins, (batch_size, min(self.config.max_tokens, 64)))}


class Policy(nn.Module):
    """states [B, k, n], actions [B, k - 1, m] -> the next action [B, m], by an MLP on T(s)."""

    def __init__(
        self, encoder: Pasta, *, state_dim: int, act_dim: int, tune: str = "probe", pool: str = "mean", width: int = 256
    ) -> None:
        super().__init__()
        one_of("pasta's policy", "tune", tune, TUNE)
        self.encoder, self.pool = encoder, pool
        inputs = encoder.config.hidden_size * (state_dim if pool == "concat" else 1)
        self.mlp = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, act_dim)
        )
        encoder.requires_grad_(tune == "full")
        if tune == "last-layer":
            encoder.blocks[-1].requires_grad_()
            encoder.norm.requires_grad_()

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.mlp(self.encoder.represent(states, actions, pool=self.pool))
