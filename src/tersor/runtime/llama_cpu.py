"""The decoder of the LLaMA family on a CPU: one compiled call a token, over a static key-value cache.

    h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rms_norm(h)
    h = h + W_down (silu(W_gate n) * W_up n),                 n = rms_norm(h)

Takes transformers' Llama, Mistral, Qwen2 and Qwen3 causal language models as they are loaded, packed or not. `why_not` says
why another model is left to `cached_module.py`, which gives the same tokens. Everything between the matmuls is float32. The
matmuls take bf16 activations where the processor has instructions for them (AVX-512 BF16, AMX). With AVX2 they take 16-bit
fixed point against packed weights, closer than bf16 and twice as fast as float32, and float32 against dense ones, whose
bfloat16 values are read as they are.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.kernels import cpp
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.runtime.engine import check_room
from tersor.runtime.llama import rotary_tables, unlike_family, visible, window_of

SOURCE = Path(__file__).with_suffix(".cpp")
CHUNK = 512  # prompt tokens that go through the layers together, which bounds the buffers
_BF16 = cpu.BF16


class _Linear(ctypes.Structure):
    _fields_ = (("call", cpu.Call), ("inputs", ctypes.c_int64), ("bias", ctypes.c_void_p))


_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")),
        ("window", ctypes.c_int64),
    )


_SIZES = ("hidden_size", "heads", "kv_heads", "head_dim", "mlp_size", "capacity", "layers")
_BUFFERS = ("hidden", "normed", "queries", "keys", "values", "attended", "gate", "up", "scores", "half_x", "half_y")


class _Model(ctypes.Structure):
    _fields_ = (
        ("matmul", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("layer", ctypes.c_void_p),
        ("head", _Linear),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cos", "sin")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int),
        ("threads", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in _BUFFERS),
    )


@functools.cache
def _library(implementation: str) -> ctypes.CDLL:
    compiled = cpp.load(SOURCE, cpu.FLAGS[implementation])
    integer = ctypes.c_int64
    compiled.tersor_before_attention.argtypes = [ctypes.POINTER(_Model), integer, integer, integer, integer]
    compiled.tersor_after_attention.argtypes = [ctypes.POINTER(_Model), integer, integer]
    compiled.tersor_logits.argtypes = [ctypes.POINTER(_Model), integer, ctypes.c_void_p]
    compiled.tersor_decode.argtypes = [ctypes.POINTER(_Model), integer, integer, ctypes.c_void_p]
    return compiled


def why_not(module: nn.Module) -> str | None:
    """Why this model does not run here; None where it does."""
    if reason := unlike_family(module):
        return reason
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return "it is not on a CPU"
    for name, each in module.named_modules():
        if isinstance(each, QuantizedLinear) and not isinstance(each.prepared, cpu.PanelWeight):
            return f"{name} has no CPU kernel"
    name, reason = cpu.choose()
    if name is None:
        return reason
    try:
        _library(name)
    except (cpp.CompileError, OSError) as error:
        return str(error)
    return None


class LlamaCPU:
    """Logits of the tokens that follow, for sequences that start together. `length` positions of the cache are filled.

    module: one for which `why_not` is None. take_over: let the module's dense weights go as they are repacked; it can no longer
    be called then. exact: float32 activations in all matmuls.
    """

    def __init__(
        self, module: nn.Module, *, capacity: int, batch: int = 1, take_over: bool = False, exact: bool = False
    ) -> None:
        inner: Any = module.model
        config: Any = module.config
        head: Any = module.lm_head
        implementation = cpu.choose()[0]
        assert implementation is not None
        self._compiled = _library(implementation)
        self._kept: list[Any] = []  # what the structs point to
        self._bf16 = implementation in _BF16 and not exact
        self._exact, self._take_over = exact, take_over
        self.capacity, self.batch, self.length = capacity, batch, 0
        self.device = torch.device("cpu")
        attention = inner.layers[0].self_attn
        self._heads, self._kv_heads, self._head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
        )
        self._embedding = inner.embed_tokens
        self._vocabulary = int(head.out_features)
        shape = batch, self._kv_heads, capacity, self._head_dim
        self._keys = [torch.zeros(shape) for _ in inner.layers]
        self._values = [torch.zeros(shape) for _ in inner.layers]
        self._windows = [window_of(layer.self_attn, config) for layer in inner.layers]
        cos, sin = rotary_tables(inner, capacity)
        layers = (_Layer * len(inner.layers))(*(self._layer(index, each) for index, each in enumerate(inner.layers)))
        self._kept.append(layers)
        self._model = _Model(
            matmul=ctypes.cast(cpu.library(implementation).tersor_matmul, ctypes.c_void_p),
            hidden_size=config.hidden_size,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            mlp_size=config.intermediate_size,
            capacity=capacity,
            layers=len(layers),
            layer=ctypes.addressof(layers),
            head=self._linear(head),
            final_norm=self._float(inner.norm.weight),
            cos=self._float(cos),
            sin=self._float(sin),
            eps=config.rms_norm_eps,
            bf16=self._bf16,
            threads=torch.get_num_threads(),
        )
        self._allocate(config.hidden_size, config.intermediate_size)

    def _allocate(self, hidden_size: int, mlp_size: int) -> None:
        rows = self.batch * min(CHUNK, self.capacity)
        queries, keys = self._heads * self._head_dim, self._kv_heads * self._head_dim
        sizes = {"hidden": hidden_size, "normed": hidden_size, "queries": queries, "keys": keys, "values": keys}
        sizes |= {"attended": queries, "gate": mlp_size, "up": mlp_size}
        self._buffers = {name: torch.empty(rows, size) for name, size in sizes.items()}
        scores = self._model.threads * self._heads // self._kv_heads * self.capacity
        self._buffers["scores"] = torch.empty(scores)
        if self._bf16:
            largest = max(*sizes.values(), self._vocabulary)
            self._buffers["half_x"] = torch.empty(rows, max(sizes.values()), dtype=torch.bfloat16)
            self._buffers["half_y"] = torch.empty(
                rows * max(sizes.values()) + self.batch * largest, dtype=torch.bfloat16
            )
        for name, buffer in self._buffers.items():
            setattr(self._model, name, buffer.data_ptr())

    def _float(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.detach().float().contiguous())
        return int(self._kept[-1].data_ptr())

    def _linear(self, layer: nn.Module) -> _Linear:
        if isinstance(layer, QuantizedLinear):
            weight = layer.prepared
            assert isinstance(weight, cpu.PanelWeight)
        else:
            assert isinstance(layer, nn.Linear)
            weight = cpu.prepare_dense(layer.weight)
            if self._take_over:
                layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        self._kept.append(weight)
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        call = cpu.call_of(weight, dtype, round_x=not self._exact and weight.bits in cpu.QUANTIZED)
        bias = layer.bias
        return _Linear(call=call, inputs=weight.in_features, bias=self._float(bias))

    def _layer(self, index: int, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linears = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
        return _Layer(
            **{name: self._linear(each) for name, each in zip(_LINEARS, linears, strict=True)},
            input_norm=self._float(layer.input_layernorm.weight),
            mlp_norm=self._float(layer.post_attention_layernorm.weight),
            **{name: None if norm is None else self._float(norm.weight) for name, norm in norms.items()},
            keys=self._keys[index].data_ptr(),
            values=self._values[index].data_ptr(),
            window=self._windows[index] or 0,
        )

    def reset(self) -> None:
        """Start new sequences in the same cache."""
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] of what follows ids [batch, tokens], which are added to the cache.

        Raises TersorError where they do not fit.
        """
        check_room(self, ids)
        batch = len(ids)
        self._model.threads = min(torch.get_num_threads(), self._model.threads)
        logits = torch.empty(batch, self._vocabulary)
        for piece in torch.split(ids, CHUNK, dim=1):
            hidden = self._embedding(piece)
            self._buffers["hidden"][: piece.numel()] = hidden.flatten(0, 1)
            if piece.shape[1] == 1:
                self._check(self._compiled.tersor_decode(self._model, batch, self.length, logits.data_ptr()))
                self.length += 1
            else:
                self._prefill(batch, piece.shape[1])
        if piece.shape[1] > 1:
            rows = self._buffers["hidden"][: piece.numel()].view(batch, piece.shape[1], -1)
            self._buffers["hidden"][:batch] = rows[:, -1].clone()
            self._check(self._compiled.tersor_logits(self._model, batch, logits.data_ptr()))
        return logits

    def _prefill(self, batch: int, tokens: int) -> None:
        start, rows = self.length, batch * tokens
        end = start + tokens
        queries = self._buffers["queries"][:rows].view(batch, tokens, self._heads, self._head_dim).transpose(1, 2)
        attended = self._buffers["attended"][:rows].view(batch, tokens, self._heads, self._head_dim)
        masks = {window: visible(start, end, window) for window in set(self._windows)}
        for index, window in enumerate(self._windows):
            self._check(self._compiled.tersor_before_attention(self._model, index, batch, tokens, start))
            mask = masks[window]
            y = nn.functional.scaled_dot_product_attention(
                queries,
                self._keys[index][:, :, :end],
                self._values[index][:, :, :end],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self._heads != self._kv_heads,
            )
            attended.copy_(y.transpose(1, 2))
            self._check(self._compiled.tersor_after_attention(self._model, index, rows))
        self.length = end

    def _check(self, status: int) -> None:
        if status != 0:
            raise MemoryError("no memory for a step of the model")
