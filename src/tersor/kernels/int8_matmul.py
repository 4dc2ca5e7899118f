"""y = round8(x) · Wᵀ with W and x in 8-bit integers: the op, its reference, and the choice of a faster implementation.

x [..., in] floating, y [..., out] in x's dtype. Every row of x is rounded to codes q_x on a grid of its own (`activation_grid.
token_codes`); W's codes q_W lie around zero, with one step s_W an output:

    y[m, o] = (Σ_i q_x[m, i] · q_W[o, i]) · s_x[m] · s_W[o]

The sum is exact, in 32-bit integers, and the two products are rounded in float32 from left to right. So all implementations
give the same bits: `reference`; the compiled kernel of `int8_matmul_cpu.py`; and torch._int_mm on an NVIDIA GPU, and on CPUs
with AVX-512 VNNI, where oneDNN has a fast one. Where a CPU has both, which one runs is measured and kept (`choices.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.formats.activation_grid import token_codes
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import choices
from tersor.kernels import int8_matmul_cpu as cpu

MOST_INPUTS = 2**17 - 1  # so many products of -128 and -128 fit in 32 bits
TORCH, REFERENCE = "torch._int_mm", "reference"
_MEASURED_ROWS = 64


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] for products with 8-bit activations.

    codes: int8 [out, in], or as `int8_matmul_cpu.pack` returns it where `implementation` is one of the compiled kernel.
    scales: floating [1, out], as in QuantizedWeight.
    steps: the same in float32 [out].
    """

    codes: Tensor
    scales: Tensor
    steps: Tensor
    in_features: int
    implementation: str  # TORCH, REFERENCE or one of `int8_matmul_cpu.FLAGS`

    @property
    def out_features(self) -> int:
        return len(self.steps)


def why_not(weight: QuantizedWeight) -> str | None:
    """Why the weight is not multiplied in 8-bit integers, or None."""
    if weight.a_bits != 8:
        return "activations that are not rounded"
    if weight.bits != 8 or len(weight.scales) != 1 or bool((weight.zeros != 128).any()):
        return "a weight that is not of 8 bits, symmetric, with one step an output"
    return f"{weight.in_features} inputs, more than {MOST_INPUTS}" if weight.in_features > MOST_INPUTS else None


def reference(x: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """The definition. codes: int8 [out, in]; steps: float32 [out]. float64 holds the sums exactly."""
    rounded, step = token_codes(x)
    sums = torch.nn.functional.linear(rounded.double(), codes.double())
    return (sums.float() * step * steps).to(x.dtype)


def torch_matmul(x: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """The same with torch._int_mm, which on a GPU takes 17 rows or more, and multiples of 8 inputs and outputs."""
    rows = x.reshape(-1, x.shape[-1])
    rounded, step = token_codes(rows)
    missing = max(0, 17 - len(rows))
    sums = torch._int_mm(torch.nn.functional.pad(rounded.to(torch.int8), (0, 0, 0, missing)), codes.t())
    return (sums[: len(rows)].float() * step * steps).to(x.dtype).view(*x.shape[:-1], -1)


def prepare(weight: QuantizedWeight) -> Int8Weight:
    """Repack for the fastest implementation on the weight's device. Raises ValueError where `why_not` has a reason."""
    if reason := why_not(weight):
        raise ValueError(f"no 8-bit product for {reason}")
    codes = (weight.codes().to(torch.int16) - 128).to(torch.int8).contiguous()
    steps = weight.scales[0].float().contiguous()
    implementation = _choose(weight.qweight.device, weight.out_features, weight.in_features)
    stored = cpu.pack(codes) if implementation in cpu.FLAGS else codes
    return Int8Weight(stored, weight.scales, steps, weight.in_features, implementation)


def restore(weight: Int8Weight) -> QuantizedWeight:
    """The weight in its standard layout again."""
    codes = (_plain_codes(weight).to(torch.int16) + 128).to(torch.uint8)
    zeros = torch.full_like(weight.scales, 128, dtype=torch.uint8)
    found = QuantizedWeight.from_codes(codes, weight.scales, zeros, bits=8, group_size=-1)
    return replace(found, a_bits=8)


def _plain_codes(weight: Int8Weight) -> Tensor:
    compiled = weight.implementation in cpu.FLAGS
    return cpu.unpack(weight.codes, weight.out_features, weight.in_features) if compiled else weight.codes


def _choose(device: torch.device, out_features: int, in_features: int) -> str:
    if device.type == "cuda" and torch.version.hip is None:
        return TORCH if out_features % 8 == 0 and in_features % 8 == 0 else REFERENCE
    if device.type != "cpu":
        return REFERENCE
    compiled, vnni = cpu.choose(), torch.cpu.get_capabilities().get("avx512_vnni", False)
    if compiled is None or not vnni:
        return compiled or (TORCH if vnni else REFERENCE)
    return _measured(compiled, out_features, in_features, torch.get_num_threads())


@functools.cache
def _measured(compiled: str, out_features: int, in_features: int, threads: int) -> str:
    """Which of the two is faster on rows of a prompt."""
    processor = torch.cpu.get_capabilities().get("cpu_name")
    asked = f"int8 {processor} {torch.__version__} {compiled} {out_features}x{in_features} {threads} threads"
    if (known := choices.recall(asked, [compiled, TORCH])) is not None:
        return known
    codes, steps = torch.ones(out_features, in_features, dtype=torch.int8), torch.ones(out_features)
    x, packed = torch.ones(_MEASURED_ROWS, in_features), cpu.pack(codes)
    calls: dict[str, Callable[[], Tensor]] = {
        compiled: lambda: cpu.matmul(x, packed, steps, compiled),
        TORCH: lambda: torch_matmul(x, codes, steps),
    }
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(4):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first fills caches
                best[name] = min(best[name], 1e6 * (time.perf_counter() - began))
    choices.keep(asked, best)
    return min(best, key=lambda name: best[name])


def _run(x: Tensor, weight: Int8Weight) -> Tensor:
    if weight.implementation == TORCH:
        return torch_matmul(x, weight.codes, weight.steps)
    if weight.implementation == REFERENCE:
        return reference(x, weight.codes, weight.steps)
    taken = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    return cpu.matmul(taken, weight.codes, weight.steps, weight.implementation).to(x.dtype)


_WEIGHT_SCHEMA = "Tensor codes, Tensor scales, Tensor steps, int in_features, str implementation"
_FIELDS = 5  # of Int8Weight; the first three are tensors


@torch.library.custom_op("tersor::int8_matmul", mutates_args=(), schema=f"(Tensor x, {_WEIGHT_SCHEMA}) -> Tensor")
def _op(x: Tensor, *fields: Any) -> Tensor:
    return _run(x, Int8Weight(*fields))


@_op.register_fake
def _(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], Int8Weight(*fields).out_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *fields = inputs
    ctx.save_for_backward(*fields[:3])
    ctx.rest = fields[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The input's gradient only, as if x were not rounded."""
    weight = Int8Weight(*ctx.saved_tensors, *ctx.rest)
    dense = _plain_codes(weight).to(grad.dtype) * weight.steps.to(grad.dtype)[:, None]
    return grad @ dense, *[None] * _FIELDS


_op.register_autograd(_backward, setup_context=_setup_context)


def matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """y = round8(x) · Wᵀ. Differentiable in x, as if it were not rounded; traceable by torch.compile."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    plain = type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())
    if plain and not torch.compiler.is_compiling():
        return _run(x, weight)  # without the operator's dispatch
    y: Tensor = _op(x, weight.codes, weight.scales, weight.steps, weight.in_features, weight.implementation)
    return y
