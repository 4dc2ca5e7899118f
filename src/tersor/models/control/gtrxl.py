"""GTrXL, a Transformer-XL that reinforcement learning can train (Parisotto et al., ICML 2020, arXiv 1910.06764).

What it is for: the memory of an agent. Every step attends to what was seen in the current segment and in the memory, so
that what mattered long ago can still decide. With actions=A it has the heads of a learner: y (T, B, A + 1), the logits of
A actions and the state's value (tersor.train.ppo trains them by acting).

    model = tersor.models.create("gtrxl", d_model=64, layers=2, heads=2, d_head=32, d_ff=128, memory_len=200)
    y, memory = model.stream(x, None)                          # x (T, B, d_model) -> (T, B, d_model)
    y, memory = model.stream(x, memory)                        # the next steps; model(x) is a segment without memory

A layer, with the segment E [T, B, D], its memory M [n, B, D] of the inputs this layer had before (without gradient):

    X = LN([M; E]);   Y = gate(E, ReLU(attention(X)));   E' = gate(Y, ReLU(MLP(LN(Y))))
    logit_ij = ((q_i + u) k_j + (q_i + v) W_p R_{i-j}) / sqrt(d_head),  keys j up to the query's own step;  R sinusoids
    gate(x, y), GRU: r = s(W_r y + U_r x), z = s(W_z y + U_z x - b), h = tanh(W_g y + U_g (r x));  (1 - z) x + z h

u, v [heads, d_head] are shared by all layers. The paper's other gates: input s(Wx) x + y; output x + s(Wx - b) y;
highway s(Wx + b) x + (1 - s(Wx + b)) y; sigtanh x + s(Wy - b) tanh(Uy); none x + y (TrXL-I).

No code of the paper is public. Two re-implementations are, and their checkpoints load into the variants named after
them:

    gtrxl_transformers_rl   memory not normalised, biases in the gates beside a constant b = 0.1, no ReLU before gates.
                            A sequence in pieces therefore differs from the whole; memory_norm=True mends it.
    gtrxl_di_engine         queries from the input before its norm, biases in attention, and a memory that starts with
                            zeros, which are attended to. (There, the memory that a call returns is that of before it.)

Origin: dhruvramani/Transformers-RL at 85e64e0, MIT; opendilab/DI-engine at d0b21d0, Apache-2.0.

Proven: the golden cases of both re-implementations and of the mended one, the first one's parameter count; streams equal to the
whole, causality, no gradient into memory, the identity behind closed gates. Trained by PPO on a T-maze
(benchmarks/results/memory_task.md): it remembers over 160 steps, where an LSTM of equal size did not learn; but Transformer-XL
without gates (TrXL) learned in more of the runs, in fewer episodes, and stood a lower learning rate better. Not proven: any
return of the paper; the paper's width of the MLP (1024) and the start b = 2 are what others report of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of
from tersor.models.key_maps import State, drop, rename
from tersor.models.registry import register

GATES = ("gru", "input", "output", "highway", "sigtanh", "none")


@dataclass(frozen=True, kw_only=True)
class GTrXLConfig:
    input_dim: int = 0  # of x; 0: d_model, without the embedding Linear ReLU
    actions: int = 0  # that the heads choose among, beside a value; 0: no heads
    d_model: int = 256  # D
    layers: int = 12
    heads: int = 8
    d_head: int = 64
    d_ff: int = 1024
    mlp_layers: int = 2  # linear maps of the MLP, ReLU between them
    memory_len: int = 512
    dropout: float = 0.0
    gate: str = "gru"
    gate_bias: float = 2.0  # b
    gate_bias_learned: bool = True  # a vector of each gate
    gate_linear_bias: bool = False
    relu_before_gate: bool = True
    memory_norm: bool = True
    query_norm: bool = True
    attention_bias: bool = False
    memory_starts: str = "empty"  # or "zeros": memory_len steps of them

    def __post_init__(self) -> None:
        one_of("gtrxl", "gate", self.gate, GATES)
        one_of("gtrxl", "memory_starts", self.memory_starts, ("empty", "zeros"))
        at_least("gtrxl", 1, layers=self.layers, heads=self.heads, d_head=self.d_head, mlp_layers=self.mlp_layers)
        at_least("gtrxl", 0, input_dim=self.input_dim, actions=self.actions, memory_len=self.memory_len)
        if self.d_model < 2 or self.d_model % 2:
            raise TersorError(f"gtrxl's d_model is even, half of it sines and half cosines; it is {self.d_model}")


class Gate(nn.Module):
    """(x, y), the skip stream and a submodule's result [T, B, D] -> [T, B, D]."""

    bg: Tensor
    Wr: nn.Linear
    Ur: nn.Linear
    Wz: nn.Linear
    Uz: nn.Linear
    Wg: nn.Linear
    Ug: nn.Linear

    def __init__(self, config: GTrXLConfig) -> None:
        super().__init__()
        self.kind, d = config.gate, config.d_model
        maps = {"gru": ("Wr", "Ur", "Wz", "Uz", "Wg", "Ug"), "sigtanh": ("Wg", "Ug"), "none": ()}
        for name in maps.get(self.kind, ("Wg",)):
            self.add_module(name, nn.Linear(d, d, bias=config.gate_linear_bias))
        if self.kind in ("input", "none"):
            return
        if config.gate_bias_learned:
            self.bg = nn.Parameter(torch.full((d,), config.gate_bias))
        else:
            self.register_buffer("bg", torch.tensor(config.gate_bias, device="cpu"), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "gru":
            r = (self.Wr(y) + self.Ur(x)).sigmoid()
            z = (self.Wz(y) + self.Uz(x) - self.bg).sigmoid()
            return (1 - z) * x + z * (self.Wg(y) + self.Ug(r * x)).tanh()
        if self.kind == "input":
            return self.Wg(x).sigmoid() * x + y
        if self.kind == "output":
            return x + (self.Wg(x) - self.bg).sigmoid() * y
        if self.kind == "highway":
            return torch.lerp(y, x, (self.Wg(x) + self.bg).sigmoid())
        if self.kind == "sigtanh":
            return x + (self.Wg(y) - self.bg).sigmoid() * self.Ug(y).tanh()
        return x + y


class RelativeAttention(nn.Module):
    """queries from [T, B, D], keys and values from [n + T, B, D]; the last T are the queries' steps."""

    def __init__(self, config: GTrXLConfig) -> None:
        super().__init__()
        d, inner, bias = config.d_model, config.heads * config.d_head, config.attention_bias
        self.heads, self.scale = config.heads, config.d_head**-0.5
        self.linear_kv = nn.Linear(d, 2 * inner, bias=bias)
        self.linear_q = nn.Linear(d, inner, bias=bias)
        self.linear_p = nn.Linear(d, inner, bias=bias)
        self.lout = nn.Linear(inner, d, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, steps: Tensor, distances: Tensor, u: Tensor, v: Tensor) -> Tensor:
        T, S = len(queries), len(steps)
        q = rearrange(self.linear_q(queries), "t b (h d) -> b h t d", h=self.heads)
        k, values = rearrange(self.linear_kv(steps), "s b (kv h d) -> kv b h s d", kv=2, h=self.heads)
        r = rearrange(self.linear_p(distances), "s (h d) -> h s d", h=self.heads)  # distance 0, 1, ..., S - 1

        device = queries.device
        away = torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)  # i - j, [T, S]
        by_distance = (q + v[:, None]) @ r.mT  # [B, H, T, S]
        position = by_distance.gather(-1, away.clamp(min=0).expand(by_distance.shape))
        logits = ((q + u[:, None]) @ k.mT + position) * self.scale
        attention = self.dropout(logits.masked_fill(away < 0, -torch.inf).softmax(-1))
        return self.dropout(self.lout(rearrange(attention @ values, "b h t d -> t b (h d)")))


class Layer(nn.Module):
    def __init__(self, config: GTrXLConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        widths = [d, *[config.d_ff] * (config.mlp_layers - 1), d]
        self.gate1, self.gate2 = Gate(config), Gate(config)
        self.mha = RelativeAttention(config)
        self.ff = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, distances: Tensor, u: Tensor, v: Tensor) -> Tensor:
        if self.config.memory_norm:
            steps = self.norm1(torch.cat((memory, x)))
        else:
            steps = torch.cat((memory, self.norm1(x)))
        queries = steps[len(memory) :] if self.config.query_norm else x
        x = self.gate1(x, self._before_gate(self.mha(queries, steps, distances, u, v)))
        return self.gate2(x, self._before_gate(self._mlp(self.norm2(x))))

    def _mlp(self, z: Tensor) -> Tensor:
        for linear in self.ff[:-1]:
            z = self.dropout(linear(z).relu())
        return self.dropout(self.ff[-1](z))

    def _before_gate(self, y: Tensor) -> Tensor:
        return y.relu() if self.config.relu_before_gate else y


@register(
    "gtrxl",
    task="act",
    input="states",
    paper="arXiv 1910.06764",
    variants={
        "gtrxl_paper": (23_627_776, {}),
        "gtrxl_transformers_rl": (
            5_524_992,
            {
                "layers": 4,
                "d_head": 32,
                "d_ff": 512,
                "memory_len": 32,
                "gate_bias": 0.1,
                "gate_bias_learned": False,
                "gate_linear_bias": True,
                "relu_before_gate": False,
                "memory_norm": False,
            },
        ),
        "gtrxl_di_engine": (
            3_746_048,
            {
                "layers": 3,
                "heads": 2,
                "d_head": 128,
                "d_ff": 256,
                "memory_len": 64,
                "query_norm": False,
                "attention_bias": True,
                "memory_starts": "zeros",
            },
        ),
    },
    small={"input_dim": 6, "d_model": 16, "layers": 2, "heads": 2, "d_head": 8, "d_ff": 24, "memory_len": 12},
)
class GTrXL(nn.Module):
    """x (T, B, input_dim), time first -> (T, B, d_model), or (T, B, actions + 1) where it has heads."""

    def __init__(self, config: GTrXLConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.u, self.v = (nn.Parameter(torch.zeros(config.heads, config.d_head)) for _ in range(2))
        self.embedding = nn.Linear(config.input_dim, d) if config.input_dim else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.Linear(d, config.actions + 1) if config.actions else None
        if self.heads is not None:
            nn.init.normal_(self.heads.weight, std=0.01)  # all actions alike at first
            nn.init.zeros_(self.heads.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x, None)[0]

    def stream(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next steps x (T, B, input_dim) after those that `memory` (layers, n, B, D) is of -> results, memory.

        The memory has every layer's inputs of the last memory_len steps; None at the start.
        """
        x = self.dropout(x if self.embedding is None else self.embedding(x).relu())
        if memory is None:
            n = self.config.memory_len if self.config.memory_starts == "zeros" else 0
            memory = x.new_zeros(len(self.layers), n, *x.shape[1:])
        wanted = (len(self.layers), memory.shape[1], *x.shape[1:])
        if tuple(memory.shape) != wanted:
            raise TersorError(
                f"gtrxl's memory is {tuple(memory.shape)}, for this x it is {wanted}, or None at the start"
            )
        memory = memory.detach()
        distances = self._sinusoids(torch.arange(memory.shape[1] + x.shape[0], device=x.device, dtype=x.dtype))
        seen = []
        for layer, before in zip(self.layers, memory, strict=True):
            seen.append(torch.cat((before, x.detach())))
            x = layer(x, before, distances, self.u, self.v)
        kept = min(len(seen[0]), self.config.memory_len)
        y = self.dropout(x)
        return y if self.heads is None else self.heads(y), torch.stack(seen)[:, len(seen[0]) - kept :]

    def _sinusoids(self, distances: Tensor) -> Tensor:
        """[S] -> [S, D]: sines, then cosines."""
        d = self.config.d_model
        frequencies = 10000 ** (-torch.arange(0, d, 2, device=distances.device, dtype=distances.dtype) / d)
        angles = distances[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(8, batch_size, self.config.input_dim or self.config.d_model)}

    def convert_checkpoint(self, state: State) -> State:
        """Both re-implementations' names; their frequencies are known."""
        return rename(
            drop(state, r"inv_freq$"),
            (r"\.ff\.ff\.(\d+)\.", lambda match: f".ff.{int(match[1]) // 3}."),
            (r"\.mlp\.(\d+)\.0\.", lambda match: f".ff.{int(match[1]) // 2}."),
            (r"\.layernorm(\d)\.", r".norm\1."),
            (r"^embedding\.0\.", "embedding."),
            (r"\.attention\.attention_(kv|q)\.0\.", r".mha.linear_\1."),
            (r"\.attention\.project_pos\.0\.", ".mha.linear_p."),
            (r"\.attention\.project\.0\.", ".mha.lout."),
        )
