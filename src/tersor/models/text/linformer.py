"""Linformer: self-attention of linear cost, by k keys and values whatever the length (Wang et al., arXiv 2006.04768).

What it is for: encoders of long sequences of at most `seq_len` tokens: classification, retrieval, masked language models.
Not for generation: every key is a mixture of all positions, so there is no causal mask, nor one for padding.

    model = tersor.models.create("linformer", dim=256, seq_len=4096, depth=4)       # y = model(x), x [B, n, dim]
    model = tersor.models.load("linformer_lm", "linformer.pth", num_tokens=20000)   # logits = model(input_ids)

With E, F [seq_len, k] of a layer, shared by its heads (the first n rows of them, for an input of n tokens):

    q, K, V = Wq x, Wk x, Wv x;   K' = Eᵀ K,  V' = Fᵀ V                     K' and V' [k, dim_head] a head
    a(x) = Wo softmax(q K'ᵀ / sqrt(dim_head)) V' + b                        O(n k) instead of O(n²)
    x = x + a(LN(x));   x = x + W2 GELU(W1 LN(x))                           depth times; no norm at the end

`share_kv` makes V = K and F = E; `one_kv_head` gives all query heads the same keys and values. `reversible` has two streams,
both x at first: x1 = x1 + a(LN(x2)), x2 = x2 + f(LN(x1)), in the end their sum; training then keeps the activations of one
layer only and computes the others back from it. `Attention` alone also takes a `context` that keys and values come from.
`linformer_lm` adds token and position embeddings and a linear head: logits [B, n, num_tokens].

Origin: lucidrains/linformer at 970e1c3 (MIT), whose key names are ours. Of the paper's variants it, and so this file, has
sharing over heads (always) and over keys and values; not sharing over layers, other k for other layers, or pooling for E.

Proven: the golden cases of that code (full size, shorter inputs, one shared key-value head) to 1e-4; gradients of the
reversible form equal those of plain backpropagation. Not proven: the paper's accuracies and speeds; that a published
reversible checkpoint gives the published outputs (no case has one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class LinformerConfig:
    dim: int = 512
    seq_len: int = 512  # the longest input
    depth: int = 6
    k: int = 256  # number of keys
    heads: int = 8
    dim_head: int | None = None  # dim / heads
    one_kv_head: bool = False
    share_kv: bool = False
    reversible: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "seq_len", "depth", "k", "heads"):
            if getattr(self, name) < 1:
                raise TersorError(f"linformer needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise TersorError(f"linformer cannot split dim {self.dim} into {self.heads} heads")

    @property
    def head_width(self) -> int:
        return self.dim_head or self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class LinformerLMConfig(LinformerConfig):
    num_tokens: int = 20000


class Attention(nn.Module):
    """x [B, n, dim] -> [B, n, dim]; keys and values from context [B, m, dim], m <= seq_len, where that is given."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.heads, self.seq_len, self.dropout = config.heads, config.seq_len, config.dropout
        width = config.head_width
        kv_width = width if config.one_kv_head else width * config.heads
        self.to_q = nn.Linear(config.dim, width * config.heads, bias=False)
        self.to_k = nn.Linear(config.dim, kv_width, bias=False)
        self.proj_k = nn.Parameter(_projection(config))
        self.to_v = None if config.share_kv else nn.Linear(config.dim, kv_width, bias=False)
        self.proj_v = None if config.share_kv else nn.Parameter(_projection(config))
        self.to_out = nn.Linear(width * config.heads, config.dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        m = source.shape[1]
        if m > self.seq_len:
            raise TersorError(f"the model takes at most {self.seq_len} tokens, not {m}")
        k = self.to_k(source)
        v = k if self.to_v is None else self.to_v(source)
        proj_v = self.proj_k if self.proj_v is None else self.proj_v
        k = torch.einsum("bmd,mk->bkd", k, self.proj_k[:m])
        v = torch.einsum("bmd,mk->bkd", v, proj_v[:m])
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        width = q.shape[-1]
        # one head of keys and values is broadcast over all heads of queries
        k, v = (rearrange(each, "b k (h d) -> b h k d", d=width).expand(-1, self.heads, -1, -1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        y: Tensor = self.to_out(rearrange(mixed, "b h n d -> b n (h d)"))
        return y


class FeedForward(nn.Module):
    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(config.dim, 4 * config.dim), nn.Linear(4 * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.dropout(F.gelu(self.w1(x))))
        return y


class PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fn(self.norm(x))
        return y


class Sequential(nn.Module):
    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            for layer in pair:
                x = x + layer(x)
        return x


class ReversiblePair(nn.Module):
    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.f, self.g = nn.ModuleDict({"net": attention}), nn.ModuleDict({"net": feed_forward})

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x1 = x1 + self.f["net"](x2)
        return x1, x2 + self.g["net"](x1)


class Reversible(nn.Module):
    """Two streams x1 and x2, both x at first; their sum in the end."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReversiblePair(*pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x1 = x2 = x
        if self.training and torch.is_grad_enabled():
            parameters = [each for each in self.blocks.parameters() if each.requires_grad]
            x1, x2 = _Recomputed.apply(x1, x2, self.blocks, *parameters)  # type: ignore[no-untyped-call]
        else:
            for block in self.blocks:
                x1, x2 = block(x1, x2)
        return x1 + x2


class _Recomputed(torch.autograd.Function):
    """The blocks, of whose activations only the last are kept: backward computes x2 = y2 - g(y1), x1 = y1 - f(x2)."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, blocks: Iterable[Any], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.parameters, ctx.random = blocks, parameters, []
        for block in blocks:
            ctx.random.append(_random_state(x1))
            x1 = x1 + block.f["net"](x2)
            ctx.random.append(_random_state(x1))
            x2 = x2 + block.g["net"](x1)
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Any, ...]:
        y1, y2 = ctx.saved_tensors
        gradients = dict.fromkeys(map(id, ctx.parameters))
        states = list(ctx.random)

        def undo(function: nn.Module, at: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            """value - function(at), and the gradient that reaches `at` through the function."""
            with torch.random.fork_rng([at.device] if at.is_cuda else []), torch.enable_grad():
                _set_random_state(states.pop(), at)
                at = at.detach().requires_grad_()
                added = function(at)
            trained = [each for each in function.parameters() if id(each) in gradients]
            through, *own = torch.autograd.grad(added, [at, *trained], gradient)
            gradients.update({id(each): found for each, found in zip(trained, own, strict=True)})
            return value - added.detach(), through

        for block in reversed(ctx.blocks):
            y2, through = undo(block.g["net"], y1, y2, d2)
            d1 = d1 + through
            y1, through = undo(block.f["net"], y2, y1, d1)
            d2 = d2 + through
        return d1, d2, None, *(gradients[id(each)] for each in ctx.parameters)


@register(
    "linformer",
    task="encode",
    input="sequence",
    paper="arXiv 2006.04768",
    variants={
        "linformer_512_k256": (20_477_952, {}),
        "linformer_512_k128": (19_691_520, {"k": 128}),
    },
    small={"dim": 32, "seq_len": 24, "depth": 2, "k": 8, "heads": 4},
)
class Linformer(nn.Module):
    """x [B, n, dim] -> [B, n, dim], n <= seq_len."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = _layers(config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, self.config.seq_len, self.config.dim)}


class _Layers(nn.Module):
    """What the language model holds of a Linformer."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.net = _layers(config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@register(
    "linformer_lm",
    task="masked-language-model",
    input="tokens",
    paper="arXiv 2006.04768",
    variants={
        "linformer_lm_512_k256": (41_240_096, {}),
    },
    small={"dim": 32, "seq_len": 24, "depth": 2, "k": 8, "heads": 4, "num_tokens": 50},
)
class LinformerLM(nn.Module):
    """input_ids [B, n] -> logits [B, n, num_tokens], n <= seq_len. Every logit depends on all of the tokens."""

    def __init__(self, config: LinformerLMConfig) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        self.pos_emb = nn.Embedding(config.seq_len, config.dim)
        self.linformer = _Layers(config)
        self.to_logits = nn.Linear(config.dim, config.num_tokens)

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.shape[1]
        if n > self.config.seq_len:
            raise TersorError(f"the model takes at most {self.config.seq_len} tokens, not {n}")
        x = self.token_emb(input_ids) + self.pos_emb.weight[:n]
        logits: Tensor = self.to_logits(self.linformer(x))
        return logits

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, self.config.num_tokens, (batch_size, self.config.seq_len))}


def _layers(config: LinformerConfig) -> nn.Module:
    pairs = [
        (PreNorm(config.dim, Attention(config)), PreNorm(config.dim, FeedForward(config))) for _ in range(config.depth)
    ]
    return Reversible(pairs) if config.reversible else Sequential(pairs)


def _projection(config: LinformerConfig) -> Tensor:
    return torch.empty(config.seq_len, config.k).uniform_(-(config.k**-0.5), config.k**-0.5)


def _random_state(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


def _set_random_state(state: tuple[Tensor, Tensor | None], x: Tensor) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], x.device)
