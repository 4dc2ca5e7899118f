"""What the engines of the LLaMA family share: which models they take, and what a layer sees.

h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rms_norm(h)
h = h + W_down (silu(W_gate n) * W_up n),                 n = rms_norm(h)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.layers.quantized_linear import QuantizedLinear

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def unlike_family(module: nn.Module) -> str | None:
    """Why this is no decoder of this arithmetic; None where it is one."""
    if type(module).__name__ not in FAMILY or not type(module).__module__.startswith("transformers."):
        return f"{type(module).__name__} is none of {', '.join(FAMILY)}"
    config: Any = module.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rope = module.model.rotary_emb.rope_type  # type: ignore[union-attr]
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary positions ({rope}) depend on the length of the text"
    for name, each in module.named_modules():
        if each._forward_hooks or each._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        if name.rpartition(".")[2] in LINEAR_NAMES and type(each) not in (nn.Linear, QuantizedLinear):
            return f"{name} is a {type(each).__name__}"
    return None


def rotary_tables(inner: Any, capacity: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [capacity, head_dim], float32, of the positions' angles. inner: the model without its head."""
    cos, sin = inner.rotary_emb(torch.empty(0), torch.arange(capacity)[None])
    return cos[0], sin[0]


def window_of(attention: Any, config: Any) -> int | None:
    """How many positions a query of this layer sees, its own included; None: all."""
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = config.sliding_window
    return None if window is None else int(window)


def visible(start: int, end: int, window: int | None, device: torch.device | None = None) -> Tensor | None:
    """Which of the keys 0 .. end - 1 the queries start .. end - 1 see, bool; None where each simply sees all before it."""
    if start == 0 and (window is None or end <= window):
        return None
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (distance >= 0) & (distance < (window or end))
