"""All layers of a LLaMA-family decoder, for one token of one sequence, as one launch on a Hopper GPU: `llama_step.cu`."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import nvrtc, quantized_matmul_cuda
from tersor.kernels.quantized_matmul_cuda import HOPPER, MULTIPROCESSOR_SHARED_BYTES
from tersor.kernels.tiled_weight import TiledWeight

# As in llama_step.cu.
WARPS, THREADS = 16, 640
STAGE_INPUTS = 512
WIDTHS = (64, 128)
PARTS = (
    "norm", "q, k, v", "barrier", "attention", "barrier", "its pieces", "o", "barrier",
    "norm", "gate, up", "barrier", "silu", "down", "barrier",
)  # fmt: skip
MIN_STAGES, MAX_STAGES = 3, 32
# By bits, as measured on an H100: how many stages a block loads at once, and how many of its later bytes are fetched into the L2
# cache.
IN_FLIGHT = {16: 8, 8: 2, 4: 3, 3: 3, 2: 4}
AHEAD_BYTES = 128 * 1024
Weight = Tensor | TiledWeight


@dataclass(frozen=True)
class StepLayer:
    """What the kernel reads of a layer, in the order of `struct Layer`. Norms and biases are float32."""

    qkv: Weight  # W_q, W_k and W_v, joined
    output: Weight
    gate_up: Weight  # W_gate and W_up, joined
    down: Weight
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv_bias: Tensor | None
    output_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    keys: Tensor  # the cache: contiguous, [1, kv heads, capacity, width], in the type of the activations
    values: Tensor
    window: int | None  # positions that a query sees, its own included; None: all

    @property
    def weights(self) -> tuple[Weight, Weight, Weight, Weight]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    width: int
    layers: int


@dataclass(frozen=True)
class _Kind:
    """The kind of all weights. bits 16: dense."""

    bits: int
    group: int = 128
    zero: int = 0
    tile_bytes: int = 0
    scale_bfloat: bool = False

    @property
    def stage_bytes(self) -> int:
        return 16 * STAGE_INPUTS * 2 if self.bits == 16 else STAGE_INPUTS // 128 * self.tile_bytes

    @property
    def sum_bytes(self) -> int:
        return (64 * 1 * 16 if self.bits == 16 else 5 * 8 * 64) * 4


def _kind_of(weight: Weight) -> _Kind:
    if isinstance(weight, Tensor):
        return _Kind(16)
    scale_bfloat = weight.scale_dtype == torch.bfloat16
    return _Kind(weight.bits, weight.tile_group, weight.zero, weight.tiles.shape[2], scale_bfloat)


def _outputs_inputs(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return weight.out_features, weight.in_features


def sizes_of(layers: Sequence[StepLayer], heads: int) -> Sizes:
    first = layers[0]
    hidden, inner = _outputs_inputs(first.down)
    return Sizes(hidden, inner, heads, first.keys.shape[1], first.keys.shape[3], len(layers))


def why_not(layers: Sequence[StepLayer], heads: int) -> str | None:
    """Why these layers do not run as one launch, or None."""
    first, sizes = layers[0], sizes_of(layers, heads)
    device, dtype = first.keys.device, first.keys.dtype
    if quantized_matmul_cuda.architecture_of(device) != HOPPER or dtype not in (torch.float16, torch.bfloat16):
        return "there is no such kernel for this device and type"
    kinds = {_kind_of(weight) for layer in layers for weight in layer.weights}
    if len(kinds) > 1:
        return "its weights are of several kinds"
    for layer in layers:
        for weight in layer.weights:
            if isinstance(weight, TiledWeight) and weight.order is not None:
                return "columns of its weights are in another order"
            if isinstance(weight, Tensor) and (weight.dtype != dtype or not weight.is_contiguous()):
                return "its weights are not contiguous, or of another type than its activations"
    if sizes.width not in WIDTHS:
        return f"its heads are {sizes.width} wide (known: {WIDTHS})"
    if sizes.hidden % 64 != 0 or sizes.inner % 64 != 0:
        return f"its sizes {sizes.hidden} and {sizes.inner} are not multiples of 64"
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    if sizes.kv_heads > blocks:
        return f"it has {sizes.kv_heads} heads of keys and values, more than the GPU has multiprocessors"
    if os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100") != "100":
        return "not all multiprocessors are free to this process, as it shares the GPU by MPS"
    if _stages(sizes, next(iter(kinds))) < MIN_STAGES:
        return "it needs more shared memory than there is"
    return None


def _pieces(weight: Weight, device: torch.device) -> Tensor:
    """Room for the parts of the outputs that blocks compute: at most one per stage."""
    outputs, inputs = _outputs_inputs(weight)
    return torch.zeros(-(-inputs // STAGE_INPUTS), -(-outputs // 256) * 256, device=device)


def _fixed_bytes(sizes: Sizes, kind: _Kind) -> int:
    """Bytes of shared memory without the stages, as the offsets AT_... in llama_step.cu."""
    inputs = max(sizes.hidden, sizes.heads * sizes.width, sizes.inner)
    x_bytes = -(-inputs // STAGE_INPUTS) * STAGE_INPUTS * 2
    queries = sizes.heads // sizes.kv_heads
    attend_bytes = (queries + 2) * sizes.width * 4 + -(-queries // 8) * 8 * (sizes.width + 8) * 2
    attend_bytes += WARPS // 2 * min(queries, 8) * (sizes.width + 2) * 4
    layer_bytes = 8 * len(fields(StepLayer))
    return (
        sizes.hidden * 4
        + max(x_bytes, attend_bytes)
        + kind.sum_bytes
        + sizes.layers * layer_bytes
        + WARPS * 4
        + sizes.width * 4
    )


def _stages(sizes: Sizes, kind: _Kind) -> int:
    room = MULTIPROCESSOR_SHARED_BYTES - _fixed_bytes(sizes, kind)
    return min(MAX_STAGES, room // (kind.stage_bytes + 16))


def source_of(sizes: Sizes, kind: _Kind, *, bfloat: bool, eps: float, blocks: int) -> str:
    constants: dict[str, int | str] = {
        "BFLOAT": int(bfloat),
        "BITS": kind.bits,
        "GROUP": kind.group,
        "ZERO": kind.zero,
        "SCALE_BFLOAT": int(kind.scale_bfloat),
        "SCALE_SUMS": 1,
        "HIDDEN": sizes.hidden,
        "INNER": sizes.inner,
        "HEADS": sizes.heads,
        "KV_HEADS": sizes.kv_heads,
        "WIDTH": sizes.width,
        "LAYERS": sizes.layers,
        "EPS": f"{eps!r}f",
        "SCALE": f"{sizes.width**-0.5 * math.log2(math.e)!r}f",
        "BLOCKS": blocks,
        "STAGES": _stages(sizes, kind),
        "IN_FLIGHT": min(IN_FLIGHT[kind.bits], _stages(sizes, kind)),
        "AHEAD": AHEAD_BYTES // kind.stage_bytes,
        "SHARED_BYTES": MULTIPROCESSOR_SHARED_BYTES,
    }
    names = ["hopper.cuh", *([] if kind.bits == 16 else ["packed_tile.cuh"]), "llama_step.cu"]
    defines = "".join(f"#define {name} ({value})\n" for name, value in constants.items())
    return defines + "".join(Path(__file__).with_name(name).read_text() for name in names)


@functools.cache
def _kernel(sizes: Sizes, kind: _Kind, bfloat: bool, eps: float, blocks: int, device: int) -> nvrtc.Kernel:
    source = source_of(sizes, kind, bfloat=bfloat, eps=eps, blocks=blocks)
    cubin = nvrtc.compile_source(source, HOPPER)
    return nvrtc.Kernel(cubin, "llama_step", shared_bytes=MULTIPROCESSOR_SHARED_BYTES)


class _Step(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "layers", "embedding", "id", "position", "cos", "sin", "final_norm", "y",
            "qkv_pieces", "output_pieces", "gate_up_pieces", "down_pieces", "attended", "softmax", "arrivals", "marks",
            "capacity",
        )
    ]  # fmt: skip


class LlamaStep:
    """The launch for one engine's layers. A call leaves rms_norm of the residual stream behind the last layer in `y`.

    layers: some for which `why_not` is None. embedding [tokens, hidden] in the type of the activations, id and position int64
    [1], cos and sin float32 [capacity, width / 2], final_norm float32 [hidden], all on one device. `y` [1, hidden]. The tensors
    must stay where they are. Every call reads the token and its position from the device, and adds the token's keys and values
    to the cache. All multiprocessors work on a launch together and wait for each other. So kernels on other streams delay it,
    and two such launches on two streams may wait for each other forever.

    profile: it leaves each multiprocessor's clock at the end of every one of PARTS, and before the first, in `marks`, int64
    [blocks, layers, 15].
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        *,
        heads: int,
        eps: float,
        embedding: Tensor,
        id: Tensor,
        position: Tensor,
        cos: Tensor,
        sin: Tensor,
        final_norm: Tensor,
        profile: bool = False,
    ) -> None:
        device, dtype = embedding.device, embedding.dtype
        sizes, kind = sizes_of(layers, heads), _kind_of(layers[0].qkv)
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._device = device
        self.y = torch.zeros(1, sizes.hidden, dtype=dtype, device=device)
        pieces = [_pieces(weight, device) for weight in layers[0].weights]
        splits = self._blocks // sizes.kv_heads
        attended = torch.zeros(heads * splits * sizes.width, device=device)
        softmax = torch.zeros(heads * splits * 2, device=device)
        arrivals = torch.zeros(1, dtype=torch.int64, device=device)
        self.marks: Tensor | None = None
        if profile:
            marks = (self._blocks, sizes.layers, len(PARTS) + 1)
            self.marks = torch.zeros(marks, dtype=torch.int64, device=device)
        table = torch.tensor([_row_of(layer) for layer in layers], dtype=torch.int64).to(device)
        tensors = [
            table, embedding, id, position, cos, sin, final_norm, self.y, *pieces, attended, softmax, arrivals, self.marks
        ]  # fmt: skip
        self._kept = (tensors, list(layers))  # kept alive, because the kernel holds their addresses
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._arguments = _Step(*addresses, layers[0].keys.shape[2])
        self._kernel = _kernel(sizes, kind, dtype == torch.bfloat16, eps, self._blocks, device.index)
        torch.cuda.synchronize(device)  # the kernel does not wait for what wrote weights and tables

    def __call__(self) -> Tensor:
        with torch.cuda.device(self._device):
            self._kernel.launch(blocks=self._blocks, threads=THREADS, arguments=[self._arguments])
        return self.y


def _row_of(layer: StepLayer) -> list[int]:
    values = [getattr(layer, field.name) for field in fields(layer)]
    return [
        0 if value is None
        else value if isinstance(value, int)
        else (value.tiles if isinstance(value, TiledWeight) else value).data_ptr()
        for value in values
    ]  # fmt: skip
