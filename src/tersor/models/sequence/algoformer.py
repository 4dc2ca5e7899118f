"""AlgoFormer: a transformer laid out like an algorithm: prepare, repeat, read off (Gao et al., TMLR 2025, 2402.13572).

What it is for: learning iterative methods in context (regression, autoregression, chains of maps) with few parameters:
the block in the middle is one, run T times, as gradient descent repeats its step.

    model = tersor.models.create("algoformer")
    prediction = model(x)                                              # tokens (B, L, d_in) -> (B, L, d_out)
    loss = training_loss(model, x, target, loops=20, window=15)        # x, target: tersor.data.in_context
    prediction = descend(X, Y, queries, steps=20, rate=0.1)            # gradient descent by linear attention, exactly

    P = pre(W x + b + positions)                                       (B, L, d_model)
    h_1 = loop(P),   h_t = loop(h_{t-1} + P)                           T times the same loop_layers blocks
    prediction = W' LN post(h_T) + b'

All blocks are causal and pre-norm: z + A(LN z), z + W2 GELU(W1 LN z), hidden 4 d_model. With T = 0 it is post(pre(x));
without `inject` h_t = loop(h_{t-1}). The training loss is the mean over the last `window` repetitions, each read off by
post, so that the loop learns to converge.

That such a loop can be gradient descent is shown by `descend`: its loop is one attention layer without softmax and with
weights set by hand. Tokens hold (x, residual, prediction), with q = k = x and v = residual; one pass adds
(rate / n) sum_i (x_j . x_i) residual_i to every prediction and takes it from every residual, which is
w <- w + (rate / n) X^T (y - X w). `newton` is Newton's iteration for the inverse of S = X^T X in the same way: tokens
hold (x, a = A x), and a_j <- 2 a_j - sum_i (x_i . a_j) a_i is A <- 2 A - A S A.

No code is published. The paper is the source of pre, loop and post; injection as in looped transformers (Yang et al.,
2311.12424), where it enters, widths, learned positions and the norm before the read-out are ours.

Proven: sharing, causality, T = 0, both constructions against the explicit methods to 1e-5, learning of a small
regression. Not proven: the published comparisons on the paper's tasks (within 440 to 860 steps a plain transformer of four times
the parameters is ahead: benchmarks/results/sequence_proofs.md), translation and text classification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class AlgoFormerConfig:
    d_in: int = 20
    d_out: int = 1
    max_len: int = 82  # of the learned positions: 41 pairs
    d_model: int = 256
    heads: int = 8
    pre_layers: int = 1
    loop_layers: int = 1
    post_layers: int = 1
    loops: int = 20  # T
    inject: bool = True  # P is added at each repetition

    def __post_init__(self) -> None:
        divides("algoformer", "heads", self.heads, "d_model", self.d_model)
        at_least("algoformer", 1, d_in=self.d_in, d_out=self.d_out, max_len=self.max_len, loop_layers=self.loop_layers)
        at_least("algoformer", 0, pre_layers=self.pre_layers, post_layers=self.post_layers, loops=self.loops)


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.attention_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.widen, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(z)), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = z + self.attention_out(rearrange(mixed, "b h l d -> b l (h d)"))
        return z + self.narrow(F.gelu(self.widen(self.norm2(z))))


@register(
    "algoformer",
    task="regress",
    input="sequence",
    paper="arXiv 2402.13572",
    variants={
        "algoformer": (2_396_417, {}),
        "looped_transformer": (816_897, {"pre_layers": 0, "post_layers": 0}),
        "plain_transformer": (9_504_257, {"pre_layers": 11, "loops": 1, "post_layers": 0}),
    },
    small={"d_in": 5, "max_len": 22, "d_model": 32, "heads": 4, "loops": 3},
)
class AlgoFormer(nn.Module):
    """x (B, L, d_in) -> predictions (B, L, d_out)."""

    def __init__(self, config: AlgoFormerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.read_in = nn.Linear(config.d_in, d)
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_len, d))
        self.pre, self.loop, self.post = (
            nn.ModuleList(Block(d, config.heads) for _ in range(count))
            for count in (config.pre_layers, config.loop_layers, config.post_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.read_out = nn.Linear(d, config.d_out)

    def forward(self, x: Tensor, loops: int | None = None) -> Tensor:
        """loops: repetitions, those of the config where not given."""
        return self.trajectory(x, loops, window=1)[-1]

    def trajectory(self, x: Tensor, loops: int | None = None, *, window: int) -> list[Tensor]:
        """The predictions after each of the last `window` repetitions; before any where there are none."""
        loops = self.config.loops if loops is None else loops
        if x.shape[1] > self.config.max_len:
            raise TersorError(f"this algoformer has positions for {self.config.max_len} tokens, not for {x.shape[1]}")
        P = h = _run(self.pre, self.read_in(x) + self.positions[: x.shape[1]])
        read = [] if loops else [self._read(h)]
        for t in range(loops):
            h = _run(self.loop, h + P if t and self.config.inject else h)
            if t >= loops - window:
                read.append(self._read(h))
        return read

    def _read(self, h: Tensor) -> Tensor:
        return self.read_out(self.norm(_run(self.post, h)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, self.config.max_len, self.config.d_in)}


def _run(blocks: nn.ModuleList, z: Tensor) -> Tensor:
    for block in blocks:
        z = block(z)
    return z


def training_loss(model: AlgoFormer, x: Tensor, target: Tensor, *, loops: int, window: int) -> Tensor:
    """Mean squared error where the target (B, L, d_out) is a number, over the last `window` of `loops` repetitions."""
    asked = ~target.isnan()
    wanted = target.nan_to_num()
    errors = [(each - wanted).square().where(asked, 0.0).sum() for each in model.trajectory(x, loops, window=window)]
    return torch.stack(errors).mean() / asked.sum()


class LinearAttention(nn.Module):
    """z_j <- z_j + W_o sum_i (W_q z_j . W_k z_i) W_v z_i over the first `context` tokens i; z (B, n, width)."""

    def __init__(self, W_q: Tensor, W_k: Tensor, W_v: Tensor, W_o: Tensor) -> None:
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Parameter(each) for each in (W_q, W_k, W_v, W_o))

    def forward(self, z: Tensor, context: int) -> Tensor:
        known = z[:, :context]
        scores = (z @ self.W_q.t()) @ (known @ self.W_k.t()).mT  # (B, n, context)
        return z + scores @ (known @ self.W_v.t()) @ self.W_o.t()


def gradient_step(d: int, rate: float) -> LinearAttention:
    """On tokens (x, residual, prediction), width d + 2. rate: eta / n."""
    x = torch.eye(d, d + 2)
    W_v = F.one_hot(torch.tensor([d]), d + 2).float()  # the residual
    W_o = rate * torch.cat((torch.zeros(d), torch.tensor([-1.0, 1.0])))[:, None]
    return LinearAttention(x, x.clone(), W_v, W_o)


def newton_step(d: int) -> LinearAttention:
    """On tokens (x, a), width 2 d: a_j <- a_j - sum_i (a_j . x_i) a_i; the caller adds the other a_j of 2 a_j."""
    x, a = torch.eye(d, 2 * d), torch.eye(2 * d)[d:]
    return LinearAttention(a, x, a.clone(), -a.t())


@torch.no_grad()
def descend(X: Tensor, Y: Tensor, queries: Tensor, *, steps: int, rate: float) -> Tensor:
    """Least squares in context by gradient descent from w = 0: X (B, n, d), Y (B, n), queries (B, m, d) -> (B, m)."""
    (_, n, d), m = X.shape, queries.shape[1]
    loop = gradient_step(d, rate / n).to(X)
    residuals = F.pad(Y, (0, m))[..., None]  # a query's answer counts as 0, and nobody looks at it
    z = torch.cat((torch.cat((X, queries), 1), residuals, torch.zeros_like(residuals)), -1)
    for _ in range(steps):
        z = loop(z, n)
    return z[:, n:, -1]


@torch.no_grad()
def newton(X: Tensor, Y: Tensor, queries: Tensor, *, steps: int) -> Tensor:
    """Least squares in context by Newton's iteration from A = S / |S|^2: shapes as in `descend`."""
    n, d = X.shape[1:]
    loop = newton_step(d).to(X)
    x = torch.cat((X, queries), 1)
    a = (x @ X.mT) @ X / torch.linalg.matrix_norm(X.mT @ X).square()[:, None, None]  # the pre-transformer's part
    for _ in range(steps):
        doubled = F.pad(a, (d, 0))
        a = (loop(torch.cat((x, a), -1), n) + doubled)[..., d:]
    return ((a[:, n:] @ X.mT) @ Y[..., None])[..., 0]  # the post-transformer's part: sum_i (a_j . x_i) y_i
