"""One token through all layers of a Mamba-1 model on a CPU in one compiled call (`tersor_mamba_token` of kernels/mamba_cpu.cpp).

What a layer does between its matmuls is so little that calls from Python, one after another, take longer than all the matmuls.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tersor.kernels import mamba_cpu
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.runtime.prepared_linear import PreparedLinear

_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_POINTERS = ("norm", "conv_weight", "conv_bias", "A", "D", "conv_before", "state_before", "conv_after", "state_after")
State = list[tuple[Tensor, ...]]


class _Linear(ctypes.Structure):
    _fields_ = (("call", cpu.Call), ("inputs", ctypes.c_int64), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """`Layer` of mamba_cpu.cpp."""

    _fields_ = (*((name, _Linear) for name in _PROJECTIONS), *((name, ctypes.c_void_p) for name in _POINTERS))


def why_not(module: Any) -> str | None:
    """Why this model of `tersor.models` goes layer by layer; None where it does not."""
    config: Any = getattr(module, "config", None)
    if getattr(type(module), "system", None) != "mamba" or config.ssm_cfg.layer != "Mamba1":
        return f"{type(module).__name__} is not Mamba-1"
    if config.attn_layer_idx or config.d_intermediate or not config.rms_norm:
        return "a layer is more than a mixer behind an RMSNorm"
    large = [
        getattr(block.mixer, name) for block in module.backbone.layers for name in _PROJECTIONS if name != "dt_proj"
    ]
    if not all(isinstance(each, PreparedLinear) for each in large):
        return "its weights are neither packed nor of values that bfloat16 holds"
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in module.parameters()):
        return "it is not of float32 on a CPU"
    return None if mamba_cpu.library() is not None else "there is no C++ compiler"


class MambaToken:
    """`step(token, state)` of a model that `why_not` has nothing against, for one sequence. Do not change the model meanwhile."""

    def __init__(self, module: Any) -> None:
        library = mamba_cpu.library()
        assert library is not None
        self._module, self._library = module, library
        blocks = module.backbone.layers
        mixer = blocks[0].mixer
        self._rank, self._n, _ = mixer.widths
        self._d_model, self._d_inner = module.config.d_model, mixer.out_proj.weight_in_panels.in_features
        self._matmul = cpu.matmul_pointer(mixer.out_proj.weight_in_panels.implementation)
        self._width, self._eps = mixer.conv1d.kernel_size[0], blocks[0].norm.eps
        self._alive: list[Any] = []  # what the pointers in `_layers` point to
        self._layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        self._room = torch.empty(4 * (self._d_model + 5 * self._d_inner + self._rank + 2 * self._n))

    def _layer(self, block: Any) -> _Layer:
        mixer = block.mixer
        made = _Layer(**{name: self._linear(getattr(mixer, name)) for name in _PROJECTIONS})
        made.norm, made.D = self._pointer(block.norm.weight), self._pointer(mixer.D)
        made.conv_weight, made.A = self._pointer(mixer.conv1d.weight), self._pointer(-torch.exp(mixer.A_log))
        if mixer.conv1d.bias is not None:
            made.conv_bias = self._pointer(mixer.conv1d.bias)
        return made

    def _linear(self, linear: Any) -> _Linear:
        weight = linear.weight_in_panels if isinstance(linear, PreparedLinear) else cpu.prepare_dense(linear.weight)
        dtype = torch.bfloat16 if weight.implementation in cpu.BF16 and weight.bits < 32 else torch.float32
        call = cpu.call_of(weight, dtype, round_x=weight.bits in cpu.QUANTIZED)
        call.threads = cpu.threads_for(weight.in_features * weight.out_features)
        self._alive.append(weight)
        bias = None if linear.bias is None else self._pointer(linear.bias)
        return _Linear(call=call, inputs=weight.in_features, bias=bias)

    def _pointer(self, tensor: Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._alive.append(kept)
        return kept.data_ptr()

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """As the model's own, for token [1]."""
        backbone = self._module.backbone
        x = backbone.embedding(token).float().contiguous()  # [1, d_model]
        before = [(conv.contiguous(), ssm.contiguous()) for conv, ssm in state]
        conv = torch.empty(len(before), 1, self._d_inner, self._width - 1)
        ssm = torch.empty(len(before), 1, self._d_inner, self._n)
        after: State = list(zip(conv.unbind(0), ssm.unbind(0), strict=True))
        for layer, old, new in zip(self._layers, before, after, strict=True):
            layer.conv_before, layer.state_before = old[0].data_ptr(), old[1].data_ptr()
            layer.conv_after, layer.state_after = new[0].data_ptr(), new[1].data_ptr()
        threads = mamba_cpu.threads_for(self._d_inner * self._n)
        failed = self._library.tersor_mamba_token(
            self._layers, len(before), self._matmul, x.data_ptr(), self._room.data_ptr(),
            self._d_model, self._d_inner, self._n, self._rank, self._width, self._eps, threads,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a token's products")
        return self._module.lm_head(backbone.norm_f(x)), after
