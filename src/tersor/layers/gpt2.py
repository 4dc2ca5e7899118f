"""GPT-2's blocks as a trunk for any vectors: x (B, L, D) -> (B, L, D), causal, with GPT-2's positions.

    trunk = GPT2(GPT2Config(n_layer=6))
    trunk.load_state_dict(to_linear(gpt2_weights(state, layers=6)))        # OpenAI's weights as transformers has them
    hidden = trunk(x)

    x = dropout(x + wpe);  x = x + attn(ln_1(x)),  x = x + c_proj(gelu_tanh(c_fc(ln_2(x))))     n_layer times;  ln_f(x)

Weights are nn.Linear's (out, in). Checkpoints hold the transposes; `to_linear` turns them. With lora_r the fused map of query,
key and value is W + (alpha / r) B A. Only A, B and the bias are trained then; the rest of the trunk is frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TURNED = r"\.(c_attn|c_fc|c_proj)(\.base_layer)?\.weight$"


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    n_embd: int = 768  # D
    n_layer: int = 12
    n_head: int = 12
    n_positions: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.1  # GPT-2's own, everywhere
    lora_r: int = 0  # rank; 0: no LoRA
    lora_alpha: float = 16
    lora_dropout: float = 0.1


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A x, W frozen; keys as peft's. B is zero at first."""

    def __init__(self, inputs: int, outputs: int, config: GPT2Config) -> None:
        super().__init__()
        self.scale = config.lora_alpha / config.lora_r
        self.base_layer = nn.Linear(inputs, outputs)
        A, B = nn.Linear(inputs, config.lora_r, bias=False), nn.Linear(config.lora_r, outputs, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": A}), nn.ModuleDict({"default": B})
        self.dropout = nn.Dropout(config.lora_dropout)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        nn.init.zeros_(B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.scale * self.lora_B["default"](self.lora_A["default"](self.dropout(x)))
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add the low-rank part to W, and set it to zero: the results stay as they are."""
        A, B = self.get_parameter("lora_A.default.weight"), self.get_parameter("lora_B.default.weight")
        self.base_layer.weight += self.scale * B @ A
        B.zero_()


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        D = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = LoRALinear(D, 3 * D, config) if config.lora_r else nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for each in self.c_attn(x).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, h, L, D / h)
        projected: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return F.dropout(projected, p=self.dropout, training=self.training)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
        return y


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class GPT2(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[0] != config.lora_r:
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("lora_B.default.weight"):
                nn.init.zeros_(parameter)
            if config.lora_r:
                parameter.requires_grad_("lora_" in name or name.endswith("c_attn.base_layer.bias"))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.wpe(torch.arange(x.shape[1], device=x.device))  # (L, D)
        x = self.dropout(x + positions)
        for block in self.h:
            x = block(x)
        normed: Tensor = self.ln_f(x)
        return normed

    def merge_lora(self) -> None:
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.merge()


def to_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with GPT-2's maps (in, out) turned to nn.Linear's (out, in). Maps that are turned already stay."""
    fused = [value for key, value in state.items() if re.search(r"\.c_attn(\.base_layer)?\.weight$", key)]
    if not fused or fused[0].shape[0] > fused[0].shape[1]:  # (3 D, D): ours
        return dict(state)
    return {key: value.T.contiguous() if re.search(TURNED, key) else value for key, value in state.items()}


def gpt2_weights(state: Mapping[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """The tensors of the trunk's first `layers` blocks, from those of a GPT-2 language model (transformers' names)."""
    bare = {key.removeprefix("transformer."): value for key, value in state.items() if not key.startswith("lm_head.")}
    mask = r"\.attn\.(bias|masked_bias)$"  # buffers of old checkpoints
    kept = {key: value for key, value in bare.items() if not re.search(mask, key)}
    number = {key: re.match(r"h\.(\d+)\.", key) for key in kept}
    return {key: value for key, value in kept.items() if (at := number[key]) is None or int(at[1]) < layers}
