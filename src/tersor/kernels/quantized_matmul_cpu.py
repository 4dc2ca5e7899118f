"""The quantized matmul on a CPU: the choice of an instruction set, the repacked weight, and the call of
`quantized_matmul_cpu.cpp`.

`prepare` turns a weight once into the layout that the kernel streams; the .cpp file describes it at its top. `restore` is the
inverse, so a model holds only one copy. All instruction sets read the same layout.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.formats.packing import packed_size
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import cpp

SOURCE = Path(__file__).with_suffix(".cpp")
PANEL = 32  # outputs side by side in memory
BLOCK_INPUTS = {2: 16, 3: 32, 4: 8, 8: 4, 16: 8, 32: 4}  # inputs of a block, and
BLOCK_WORDS = {2: 1, 3: 3, 4: 1, 8: 1, 16: 4, 32: 4}  # the 32-bit words they take
QUANTIZED = (2, 3, 4, 8)
BF16 = ("avx512_bf16", "amx")  # implementations that multiply bfloat16 activations
_WORTH_THREADS = 2**18  # multiply-adds; for fewer, waking threads costs more than they save
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vbmi2")
FLAGS = {  # best first
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}


def supported() -> list[str]:
    """The implementations that this processor can run, best first, even without a compiler."""
    has = torch.cpu.get_capabilities()
    avx2 = has.get("avx2", False) and has.get("fma3", False)
    avx512 = avx2 and all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "vl", "dq"))
    bf16 = avx512 and has.get("avx512_bf16", False) and has.get("avx512_vbmi2", False)
    amx = bf16 and has.get("amx_tile", False) and has.get("amx_bf16", False)
    found = {"amx": amx, "avx512_bf16": bf16, "avx512": avx512, "avx2": avx2, "portable": True}
    return [name for name, yes in found.items() if yes]


def best_build(source: Path, flags: Sequence[str]) -> ctypes.CDLL | None:
    """Another source, built for the best instructions that processor and compiler share; None where it cannot be built."""
    for name in supported():
        try:
            return cpp.load(source, (*FLAGS[name], *flags))
        except (cpp.CompileError, OSError):
            continue
    return None


@functools.cache
def library(implementation: str) -> ctypes.CDLL:
    """The compiled kernel for one instruction set. Raises cpp.CompileError."""
    if implementation == "amx" and not torch.cpu._init_amx():
        raise cpp.CompileError("the system does not grant this process the use of AMX")
    compiled = cpp.load(SOURCE, FLAGS[implementation])
    compiled.tersor_matmul.argtypes = [ctypes.POINTER(Call)]
    compiled.tersor_repack.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 3
    compiled.tersor_repack.restype = None
    return compiled


@functools.cache
def choose() -> tuple[str | None, str]:
    """The best implementation that this processor runs and the compiler builds, or None; and why it is not a better one."""
    refused = []
    for name in supported():
        try:
            library(name)
        except (cpp.CompileError, OSError) as error:
            refused.append(f"{name}: {error}")
        else:
            return name, "; ".join(refused) or "the best this processor supports"
    return None, "; ".join(refused)


def describe() -> str:
    """Which implementation runs here and why, as a line to show."""
    name, why = choose()
    model = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    processor = f"{model}, {torch.get_num_threads()} threads"
    if name is None:
        return f"no compiled kernel ({why}); torch's int4 operator or dequantization runs instead, on {processor}"
    return f"compiled kernel for {name} ({why}), on {processor}"


@dataclass(frozen=True)
class PanelWeight:
    """A weight [out, in] as the kernel reads it.

    packed:  int32 [panels, blocks, words, 32], see the .cpp file.
    scales:  float16, bfloat16 or float32 [panels, groups, 32].
    zeros:   uint8 [panels, groups, 32], or None where all are 2^(bits-1).
    columns: int32 [blocks * inputs of a block], the input at every packed place (-1: none), or None where that is
             the natural order without gaps.
    starts:  int32 [groups + 1], the first block of every group.
    g_idx:   as in QuantizedWeight, only for `restore`.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    starts: Tensor
    g_idx: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    implementation: str


def why_not(weight: QuantizedWeight) -> str | None:
    """Why `prepare` cannot take this weight, or None."""
    if weight.a_bits is not None:
        return "inputs that are rounded"
    if weight.bits not in QUANTIZED:
        return f"{weight.bits} bits (has kernels for {list(QUANTIZED)})"
    if weight.scales.dtype not in _TYPES:
        return f"scales of {weight.scales.dtype} (has kernels for {', '.join(map(str, _TYPES))})"
    name, why = choose()
    return why if name is None else None


def _order(groups: Tensor, count: int, block: int) -> tuple[Tensor | None, Tensor]:
    """`columns` and `starts` (see PanelWeight). Each group is padded to whole blocks. groups: int64 [in]."""
    sizes = torch.bincount(groups, minlength=count)
    blocks = (sizes + block - 1) // block
    starts = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
    order = groups.argsort(stable=True)
    first = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[:-1]  # place of every group's first column in `order`
    place = starts[groups[order]] * block + torch.arange(len(order)) - first[groups[order]]
    columns = torch.full((int(starts[-1]) * block,), -1, dtype=torch.int32)
    columns[place] = order.to(torch.int32)
    natural = len(columns) == len(groups) and bool((columns == torch.arange(len(groups))).all())
    return None if natural else columns, starts.to(torch.int32)


def _to_panels(values: Tensor) -> Tensor:
    """[groups, out] -> [panels, groups, 32]"""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % PANEL))
    return padded.view(len(values), -1, PANEL).transpose(0, 1).contiguous()


def _from_panels(values: Tensor, out_features: int) -> Tensor:
    return values.transpose(0, 1).flatten(1)[:, :out_features].contiguous()


def prepare(weight: QuantizedWeight, *, implementation: str | None = None) -> PanelWeight:
    """Repack for the kernel. implementation: by default the best one. Raises ValueError where `why_not` has a reason."""
    if implementation is None:
        if reason := why_not(weight):
            raise ValueError(f"no CPU kernel for this weight: {reason}; use the reference")
        implementation = choose()[0]
    assert implementation is not None
    bits = weight.bits
    groups = weight.groups()
    if weight.in_features and int(groups.max()) >= len(weight.scales):
        raise ValueError(f"a column is in group {int(groups.max())}, but scales are for {len(weight.scales)} groups")
    columns, starts = _order(groups, len(weight.scales), BLOCK_INPUTS[bits])
    blocks, panels = int(starts[-1]), -(-weight.out_features // PANEL)
    packed = torch.zeros(panels, blocks, BLOCK_WORDS[bits], PANEL, dtype=torch.int32)
    qweight, threads = weight.qweight.contiguous(), torch.get_num_threads()
    pointers = qweight.data_ptr(), packed.data_ptr(), _pointer(columns)
    library(implementation).tersor_repack(*pointers, blocks, weight.out_features, bits, threads, False)
    symmetric = bool((weight.zeros == 2 ** (bits - 1)).all())
    return PanelWeight(
        packed=packed,
        scales=_to_panels(weight.scales),
        zeros=None if symmetric else _to_panels(weight.zeros),
        columns=columns,
        starts=starts,
        g_idx=weight.g_idx,
        bits=bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        implementation=implementation,
    )


def prepare_dense(weight: Tensor) -> PanelWeight:
    """A float weight [out, in] as the kernel reads it: bfloat16 ("16 bits") where it holds the weight exactly, else float32 ("32
    bits"). It cannot be turned back into a QuantizedWeight. Raises ValueError where there is no kernel.
    """
    implementation, reason = choose()
    if implementation is None:
        raise ValueError(f"no CPU kernel: {reason}; use torch.nn.functional.linear")
    rounded = weight.detach().bfloat16()
    exact = weight.dtype == torch.bfloat16 or bool((rounded.to(weight.dtype) == weight).all())
    stored = rounded.view(torch.int16) if exact else weight.detach().float().view(torch.int32)
    bits = 16 if exact else 32
    out_features, in_features = weight.shape
    block = BLOCK_INPUTS[bits]
    blocks, panels = -(-in_features // block), -(-out_features // PANEL)
    full = torch.nn.functional.pad(stored, (0, blocks * block - in_features, 0, panels * PANEL - out_features))
    words = full.view(panels, PANEL, blocks, BLOCK_WORDS[bits], -1).permute(0, 2, 3, 1, 4).contiguous()
    columns = None
    if blocks * block != in_features:
        columns = torch.full((blocks * block,), -1, dtype=torch.int32)
        columns[:in_features] = torch.arange(in_features)
    return PanelWeight(
        packed=words.view(torch.int32).view(panels, blocks, BLOCK_WORDS[bits], PANEL),
        scales=torch.ones(panels, 1, PANEL),
        zeros=None,
        columns=columns,
        starts=torch.tensor([0, blocks], dtype=torch.int32),
        g_idx=None,
        bits=bits,
        group_size=-1,
        in_features=in_features,
        out_features=out_features,
        implementation=implementation,
    )


def restore(weight: PanelWeight) -> QuantizedWeight:
    """The weight in its standard layout again: the same integers, scales and zero points."""
    bits, out_features = weight.bits, weight.out_features
    qweight = torch.zeros(packed_size(weight.in_features, bits), out_features, dtype=torch.int32)
    pointers = qweight.data_ptr(), weight.packed.data_ptr(), _pointer(weight.columns)
    blocks, threads = weight.packed.shape[1], torch.get_num_threads()
    library(weight.implementation).tersor_repack(*pointers, blocks, out_features, bits, threads, True)
    scales = _from_panels(weight.scales, out_features)
    if weight.zeros is None:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = _from_panels(weight.zeros, out_features)
    return QuantizedWeight(qweight, scales, zeros, weight.g_idx, bits, weight.group_size, weight.in_features)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Call(ctypes.Structure):
    """`Call` of the .cpp file."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("scale_type", ctypes.c_int),
        ("bits", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("round_x", ctypes.c_int),
    )


def call_of(weight: PanelWeight, dtype: torch.dtype, *, round_x: bool = False) -> Call:
    """The argument of `tersor_matmul` for activations of this type, without x, y, rows and threads. Keep the weight alive.

    round_x: float32 activations may be taken in 16-bit fixed point (the .cpp file says how) where that is faster.
    """
    return Call(
        outputs=weight.out_features,
        packed=weight.packed.data_ptr(),
        columns=_pointer(weight.columns),
        starts=weight.starts.data_ptr(),
        groups=weight.scales.shape[1],
        scales=weight.scales.data_ptr(),
        zeros=_pointer(weight.zeros),
        type=_TYPES[dtype],
        scale_type=_TYPES[weight.scales.dtype],
        bits=weight.bits,
        round_x=round_x,
    )


def threads_for(products: int) -> int:
    """How many threads are worth waking for so many multiply-adds."""
    return torch.get_num_threads() if products >= _WORTH_THREADS else 1


def matmul_pointer(implementation: str) -> ctypes.c_void_p:
    """`tersor_matmul`, for compiled code that calls it."""
    return ctypes.cast(library(implementation).tersor_matmul, ctypes.c_void_p)


def _run(x: Tensor, weight: PanelWeight, *, round_x: bool = False) -> Tensor:
    if x.dtype == torch.float64:
        return torch.nn.functional.linear(x, restore(weight).dequantize(torch.float64))
    if x.dtype not in (torch.float32, torch.bfloat16):
        return _run(x.float(), weight).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.out_features))
    call = call_of(weight, x.dtype, round_x=round_x)
    call.x, call.x_stride, call.rows, call.y = rows.data_ptr(), rows.stride(0), rows.shape[0], y.data_ptr()
    call.threads = threads_for(rows.numel() * weight.out_features)
    if library(weight.implementation).tersor_matmul(call) != 0:
        raise MemoryError(f"no memory for a product of {rows.shape[0]} rows")
    return y


_WEIGHT_SCHEMA = (
    "Tensor packed, Tensor scales, Tensor? zeros, Tensor? columns, Tensor starts, Tensor? g_idx, "
    "int bits, int group_size, int in_features, int out_features, str implementation"
)  # the fields of PanelWeight; the first six are tensors
_TENSORS = 6


@torch.library.custom_op(
    "tersor::quantized_matmul_cpu",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, {_WEIGHT_SCHEMA}) -> Tensor",
)
def _op(x: Tensor, *fields: Any) -> Tensor:
    return _run(x, PanelWeight(*fields))


@torch.library.custom_op(
    "tersor::quantized_matmul_cpu_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, {_WEIGHT_SCHEMA}) -> Tensor",
)
def _backward_op(grad: Tensor, *fields: Any) -> Tensor:
    return grad @ restore(PanelWeight(*fields)).dequantize(grad.dtype)


@_op.register_fake
def _(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], PanelWeight(*fields).out_features))


@_backward_op.register_fake
def _(grad: Tensor, *fields: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], PanelWeight(*fields).in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *fields = inputs
    ctx.save_for_backward(*fields[:_TENSORS])
    ctx.rest = fields[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The input's gradient only: the integers are frozen."""
    fields = (*ctx.saved_tensors, *ctx.rest)
    return _backward_op(grad, *fields), *[None] * len(fields)


_op.register_autograd(_backward, setup_context=_setup_context)


def matmul(x: Tensor, weight: PanelWeight, *, round_x: bool = False) -> Tensor:
    """y = x · Wᵀ. x [..., in], y [..., out] in x's dtype. Differentiable in x; traceable by torch.compile.

    round_x: as in `call_of`; where x wants a gradient or is traced, it is not rounded."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    plain = type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())
    if plain and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _run(x, weight, round_x=round_x)  # as the operator, without the 30 us of its dispatch
    y: Tensor = _op(
        x,
        weight.packed,
        weight.scales,
        weight.zeros,
        weight.columns,
        weight.starts,
        weight.g_idx,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.implementation,
    )
    return y
