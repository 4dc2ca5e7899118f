"""FlashRNN: recurrent networks with heads (LSTM, GRU, Elman, sLSTM) as one op a sequence (Pöppel et al., 2412.07752).

What it is for: tasks that need a state to be tracked, such as parity, which these cells solve at any length and linear
recurrences and attention do not; and decoding with a state of fixed size.

    model = tersor.models.create("flashrnn", function="lstm", vocab_size=16, d_model=64, num_heads=2, n_layer=1)
    logits = model(input_ids)                           # (B, T) -> (B, T, vocab_size)
    logits, state = model.prefill(input_ids)            # then token by token: model.step(token, state)

    x = embed(input_ids);   n_layer times:  x = x + W_o RNN(Norm x),  x = x + W_2 GELU(W_1 Norm x);   logits = W Norm x
    RNN: W x_t (B, T, gates, heads, head_dim), then tersor.kernels.flashrnn: the cells' formulas stand there

`RNN` is the layer to use in other models. One head of it is nn.LSTM or nn.GRU with R dense; more heads have a block of R
each, d_model^2 / num_heads numbers a gate. State: what the cell keeps (1, 2 or 4 times d_model numbers a layer).

Origin: NX-AI/flashrnn at d73fb52, NXAI Community License; written from its equations. Published is the function, without
a model or checkpoints: the block above, the names and the start are ours. R starts normal with deviation
head_dim^-0.5 / 2; b at 0, but the forget gate's at 1 (lstm) or from 3 to 6 over the head's width (slstm), so that it
remembers at first. Published options that only its CUDA code has are missing: gradient_recurrent_cut,
gradient_recurrent_clipval, forward_clipval. There is no padding of the batch.

Proven: the golden cases of the published code (every cell: states, loss and gradients), equality with nn.LSTM and
nn.GRU for one head, derivatives by finite differences, steps equal to the whole.
One sLSTM of 64 channels, trained in 300 steps on the parity of 40 bits, is right at every place of 2,000 unseen sequences of
256 (benchmarks/results/sequence_proofs.md). The GPU form: on an H200, every cell and the form for wide heads equal the CPU's;
training 1024 steps of 768 units in heads of 64 is 115 to 137 times as fast as the loop and 3.7 times cuDNN's dense LSTM
(benchmarks/results/flashrnn.md). It is float32 only, and fused for heads up to 64 wide (elman 128).
In 1,040 and 1,300 steps two transformers, in 560 Mamba came to 53, 74 and 82 % within 40 bits, and guess beyond.
Not proven: the published speeds in bfloat16, and that these fail however long they train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.flashrnn import flashrnn
from tersor.kernels.flashrnn_cells import CELLS
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.registry import register

State: TypeAlias = list[Tensor]  # a layer's: [S, B, 1, heads, head_dim]


@dataclass(frozen=True, kw_only=True)
class FlashRNNConfig:
    vocab_size: int = 256
    d_model: int = 768  # num_heads times the head's width
    num_heads: int = 12
    n_layer: int = 6
    function: str = "slstm"  # or lstm, gru, elman
    mlp_ratio: int = 4  # 0: no MLP
    initial_val: tuple[float, ...] = ()  # where each of the cell's states starts; empty: all at 0
    trainable_r: bool = True
    trainable_b: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of("flashrnn", "function", self.function, CELLS)
        at_least("flashrnn", 1, vocab_size=self.vocab_size, num_heads=self.num_heads, n_layer=self.n_layer)
        at_least("flashrnn", 0, mlp_ratio=self.mlp_ratio, dropout=self.dropout)
        divides("flashrnn", "num_heads", self.num_heads, "d_model", self.d_model)
        states = CELLS[self.function].states
        if len(self.initial_val) not in (0, states):
            raise TersorError(
                f"flashrnn's initial_val for a {self.function} has {states} numbers, not {self.initial_val}"
            )


class RNN(nn.Module):
    """x (B, T, d_in), states [S, B, 1, N, D] or None -> h (B, T, N D) and the last states."""

    def __init__(
        self,
        d_in: int,
        *,
        num_heads: int,
        head_dim: int,
        function: str = "lstm",
        initial_val: tuple[float, ...] = (),
        trainable_r: bool = True,
        trainable_b: bool = True,
    ) -> None:
        super().__init__()
        one_of("flashrnn", "function", function, CELLS)
        self.cell, self.function, self.initial_val = CELLS[function], function, initial_val
        self.num_heads, self.head_dim = num_heads, head_dim
        self.W = nn.Linear(d_in, self.cell.input_gates * num_heads * head_dim, bias=False)
        R = torch.randn(self.cell.recurrent_gates, num_heads, head_dim, head_dim) * (0.5 * head_dim**-0.5)
        self.R = nn.Parameter(R, requires_grad=trainable_r)
        b = torch.zeros(self.cell.gates, num_heads, head_dim)
        if function == "lstm":
            b[1] = 1.0
        if function == "slstm":
            b[1] = torch.linspace(3, 6, head_dim)
        self.b = nn.Parameter(b, requires_grad=trainable_b)

    def forward(self, x: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        Wx = self.W(x).unflatten(-1, (self.cell.input_gates, self.num_heads, self.head_dim))
        if states is None and any(self.initial_val):
            start = Wx.new_tensor(self.initial_val)
            states = start[:, None, None, None, None].expand(-1, x.shape[0], 1, self.num_heads, self.head_dim)
        after, last = flashrnn(Wx, self.R, self.b, states, function=self.function)
        return after[0].flatten(-2), last


class Block(nn.Module):
    def __init__(self, config: FlashRNNConfig) -> None:
        super().__init__()
        d = config.d_model
        self.norm1 = nn.LayerNorm(d)
        self.rnn = RNN(
            d,
            num_heads=config.num_heads,
            head_dim=d // config.num_heads,
            function=config.function,
            initial_val=config.initial_val,
            trainable_r=config.trainable_r,
            trainable_b=config.trainable_b,
        )
        self.out = nn.Linear(d, d)
        self.dropout = nn.Dropout(config.dropout)
        self.with_mlp = config.mlp_ratio > 0
        if self.with_mlp:
            self.norm2 = nn.LayerNorm(d)
            self.fc1 = nn.Linear(d, config.mlp_ratio * d)
            self.fc2 = nn.Linear(config.mlp_ratio * d, d)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, state = self.rnn(self.norm1(x), state)
        x = x + self.dropout(self.out(h))
        if self.with_mlp:
            x = x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x, state


@register(
    "flashrnn",
    task="language-model",
    input="tokens",
    paper="arXiv 2412.07752",
    variants={
        "flashrnn_slstm": (47_645_184, {}),
        "flashrnn_lstm": (47_645_184, {"function": "lstm"}),
        "flashrnn_gru": (43_811_328, {"function": "gru"}),
        "flashrnn_elman": (36_129_792, {"function": "elman"}),
    },
    small={"vocab_size": 32, "d_model": 16, "num_heads": 2, "n_layer": 2},
)
class FlashRNN(nn.Module):
    """input_ids (B, T) -> logits (B, T, vocab_size)."""

    def __init__(self, config: FlashRNNConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.prefill(input_ids)[0]

    def prefill(
        self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        x, after = self.embed(input_ids), []
        for index, block in enumerate(self.blocks):
            x, last = block(x, None if state is None else state[index])
            after.append(last)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x)), after

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, vocab_size) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.vocab_size, (batch_size, 12))}
