"""The GPT of the chain-of-thought benchmark (Feng et al., NeurIPS 2023, arXiv 2305.15408).

What it is for: measuring what writing the steps is worth. On arithmetic, linear equations, longest increasing
subsequences and edit distance (tersor.data.chain_of_thought makes all four) three layers that write a chain of thought
answer right, three to five that answer at once do not, the less so the longer the problem.

    model = tersor.models.load("cot_arithmetic", "checkpoint.pt")
    logits = model(input_ids)                                          # (B, L) -> (B, L, vocab)
    logits, state = model.prefill(input_ids)                           # the same, and what the model remembers
    logits, state = model.step(token, state)                           # token (B,) -> (B, vocab)

    x = LN(embedding(ids) + P)                           P: sinusoids, interleaved; none with rpe
    x = x + W_o A(LN1 x),  x = x + W_2 GELU(W_1 LN2 x)   num_layer times; A causal; GELU by tanh, hidden 4 dmodel
    logits = W LN x + b

With `rpe` the scores of head h = 1..H get ALiBi's -(i - j) 2^(-8 h / H) instead of positions. Token 0 is padding, on the
right: its embedding is 0 at first and does not learn. maxlen is the size of the published buffers, which are formulae
here: a longer text works, and maxlen says where generation ends (tersor.evaluate.chain_of_thought). Direct answers were
published with num_layer 3, 4 and 5.

Origin: guyuntian/CoT_benchmark at 650a246, MIT. Its key names are ours; its buffers (positions, masks, ALiBi) are
dropped from a checkpoint. Every Linear and LayerNorm begins as PyTorch makes it.

Proven: the golden cases of the published code (both kinds of positions), its parameter count, cached steps equal to the
whole sequence; trained on arithmetic with six operators for 6,791 steps, it answers 99.2 % of unseen questions by a chain
(benchmarks/results/sequence_proofs.md). Not proven: the published accuracies without a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.checks import at_least, divides
from tersor.layers.positions import sinusoids
from tersor.models.key_maps import drop
from tersor.models.registry import register

LayerState = tuple[Tensor, Tensor]  # keys and values, each (B, heads, past, d)
State = list[LayerState]


@dataclass(frozen=True, kw_only=True)
class CoTConfig:
    vocab: int = 21
    maxlen: int = 87
    dmodel: int = 256
    head: int = 4
    drop: float = 0.1
    num_layer: int = 3
    rpe: bool = False  # ALiBi instead of sinusoids

    def __post_init__(self) -> None:
        at_least("cot", 1, vocab=self.vocab, maxlen=self.maxlen, num_layer=self.num_layer)
        divides("cot", "head", self.head, "dmodel", self.dmodel)


class Embedding(nn.Module):
    def __init__(self, config: CoTConfig) -> None:
        super().__init__()
        self.sinusoidal = not config.rpe
        self.tok_embed = nn.Embedding(config.vocab, config.dmodel, padding_idx=0)
        self.norm = nn.LayerNorm(config.dmodel)

    def forward(self, input_ids: Tensor, past: int) -> Tensor:
        x = self.tok_embed(input_ids)
        if self.sinusoidal:
            x = x + sinusoids(past + x.shape[1], x.shape[2]).to(x)[past:]
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, config: CoTConfig) -> None:
        super().__init__()
        self.heads, self.drop, self.rpe = config.head, config.drop, config.rpe
        self.c_attn = nn.Linear(config.dmodel, 3 * config.dmodel)
        self.c_proj = nn.Linear(config.dmodel, config.dmodel)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        q, k, v = rearrange(self.c_attn(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        past = 0 if state is None else state[0].shape[2]
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        bias = self._bias(q, past, k.shape[2]) if self.rpe or past else None
        drop = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, is_causal=bias is None)
        return self.c_proj(rearrange(y, "b h l d -> b l (h d)")), (k, v)

    def _bias(self, q: Tensor, past: int, total: int) -> Tensor:
        """What is added to the scores: -inf for the future and, with rpe, ALiBi: (heads or 1, L, past + L)."""
        i, j = torch.arange(past, total, device=q.device)[:, None], torch.arange(total, device=q.device)
        bias = torch.zeros(1, len(i), total, device=q.device)
        if self.rpe:
            h = torch.arange(1, self.heads + 1, device=q.device)[:, None, None]
            bias = (j - i) * 2.0 ** (-8 * h / self.heads)
        return bias.masked_fill(j > i, float("-inf")).to(q.dtype)


class MLP(nn.Module):
    def __init__(self, dmodel: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dmodel, 4 * dmodel)
        self.c_proj = nn.Linear(4 * dmodel, dmodel)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: CoTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.dmodel)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.dmodel)
        self.mlp = MLP(config.dmodel)
        self.drop = nn.Dropout(config.drop)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        mixed, state = self.attn(self.ln_1(x), state)
        x = x + self.drop(mixed)
        return x + self.drop(self.mlp(self.ln_2(x))), state


class Transformer(nn.Module):
    def __init__(self, config: CoTConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.drop = nn.Dropout(config.drop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layer))
        self.ln_f = nn.LayerNorm(config.dmodel)

    def forward(self, input_ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        x = self.drop(self.embedding(input_ids, 0 if state is None else state[0][0].shape[2]))
        after: State = []
        for index, block in enumerate(self.h):
            x, layer_state = block(x, None if state is None else state[index])
            after.append(layer_state)
        return self.ln_f(x), after


@register(
    "cot",
    task="language-model",
    input="tokens",
    paper="arXiv 2305.15408",
    variants={
        "cot_arithmetic": (2_381_077, {}),
        "cot_arithmetic_alibi": (2_381_077, {"rpe": True, "maxlen": 1000}),
        "cot_equation": (2_381_590, {"vocab": 22, "maxlen": 316}),
        "cot_lis": (2_500_093, {"vocab": 253, "maxlen": 205}),
        "cot_edit_distance": (2_416_987, {"vocab": 91, "maxlen": 508}),
    },
    small={"dmodel": 32, "num_layer": 2, "rpe": True},
)
class CoT(nn.Module):
    """input_ids (B, L) -> logits (B, L, vocab)."""

    def __init__(self, config: CoTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.dmodel, config.vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.prefill(input_ids)[0]

    def prefill(
        self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        x, state = self.transformer(input_ids, state)
        return self.lm_head(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, vocab) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(1, self.config.vocab, (batch_size, 24))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return drop(state, r"embedding\.pe$", r"\.attn\.bias$", r"\.attn\.RPE$")
