"""The quantized matmul on NVIDIA GPUs: compiles, cuts and launches `quantized_matmul.cu` for Hopper, and defines the operator.

`quantized_matmul_mma.py` does the same for other GPUs of compute capability 8.0 and up. On other devices, and for x in other
types than float16 and bfloat16, a prepared weight is restored and the reference is used.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import nvrtc, quantized_matmul_mma
from tersor.kernels.tiled_weight import K_TILE, TiledWeight, restore
from tersor.kernels.work_list import Shape, processors, workspace

HOPPER = "sm_90a"

MULTIPROCESSOR_SHARED_BYTES = 227 * 1024
SMALL_WEIGHT_BYTES = 48 * 2**20  # for smaller weights, starting and ending a launch takes longer than streaming


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut.

    n_tile: rows of x that share one pass over the weight, a multiple of 8 up to 256.
    warpgroups: consumers of 64 outputs each in a thread block.
    resident: thread blocks that fit on a multiprocessor.
    tiles: of 128 inputs each, in a pipeline stage.
    scale_sums: scale a group's sums, not its codes. Takes n_tile / 2 registers more and saves arithmetic and power.
    """

    n_tile: int
    warpgroups: int
    resident: int = 1
    tiles: int = 1
    scale_sums: bool = False

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    def registers(self) -> tuple[int, int]:
        """Registers of a consumer's and of the producer's threads: multiples of 8, within the multiprocessor's 65536."""
        producer, each = 24, 65536 // (self.threads * self.resident) // 8 * 8
        consumer = (each * (self.warpgroups + 1) - producer) // self.warpgroups // 8 * 8
        return min(consumer, 240), producer

    def stage_bytes(self, tile_bytes: int) -> int:
        size = self.tiles * (self.n_tile * K_TILE * 2 + self.warpgroups * tile_bytes)
        return -(-size // 1024) * 1024

    def stages(self, tile_bytes: int) -> int:
        return min(16, (MULTIPROCESSOR_SHARED_BYTES // self.resident - 2048) // self.stage_bytes(tile_bytes))


@functools.cache
def launch_for(rows: int, blocks: int, k_tiles: int, tile_bytes: int, bits: int, processors: int) -> tuple[Launch, int]:
    """The launch for x of `rows` rows and a weight of [blocks, k_tiles] tiles, and its number of thread blocks.

    The table comes from measuring the candidates on an H200 (benchmarks/gpu_matmul.py shows what it gives).
    """
    small = blocks * k_tiles * tile_bytes < SMALL_WEIGHT_BYTES
    if rows <= 32:
        n_tile = 8 if rows <= 8 else 16 if rows <= 16 else 32
        if n_tile == 32:
            how = Launch(32, 2, 2, 1, True) if small else Launch(32, 3, 1, 2, True)
        else:
            how = Launch(n_tile, 3, 2, 2, True) if small else Launch(n_tile, 2, 2, 4 if bits < 4 else 2, True)
        while how.tiles > 1 and how.stages(tile_bytes) < 3:
            how = replace(how, tiles=how.tiles // 2)
        # A small weight takes one block a multiprocessor and leaves room there for the next launch to fetch its weight.
        return how, processors if small else processors * how.resident
    if rows <= 64:
        how = Launch(64, 2, scale_sums=True) if small else Launch(64, 3, scale_sums=True)
    elif rows <= 128:
        how = Launch(128, 2, scale_sums=True) if small else Launch(128, 3)
    else:
        # About what a pass over 256, 192 and 128 rows costs; take what covers the rows most cheaply.
        n_tile = min((256, 192, 128), key=lambda n: -(-rows // n) * {256: 1.0, 192: 0.8, 128: 0.58}[n])
        how = Launch(128, 2, scale_sums=True) if n_tile == 128 else Launch(n_tile, 2)
        if -(-blocks // 2) * -(-rows // how.n_tile) < processors // 2:
            how = Launch(128, 2, scale_sums=True)
    while how.stages(tile_bytes) < 2:
        how = Launch(how.n_tile, how.warpgroups - 1, scale_sums=how.scale_sums)

    # Sharing a tile among blocks costs a pass over its sums through memory: whole tiles where they fill the machine.
    output_tiles = -(-blocks // how.warpgroups) * -(-rows // how.n_tile)
    if output_tiles < processors:
        return how, output_tiles * (processors // output_tiles)
    rounds = -(-output_tiles // processors)
    return how, -(-output_tiles // rounds) if output_tiles > 0.9 * rounds * processors else processors


def _wgmma(n_tile: int, dtype: str) -> str:
    """The device function `wgmma`: d = a[64, 16] · x[16, n_tile] (+ d). An instruction must name all its registers."""
    count = n_tile // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    operands = f"{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0"
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], const unsigned (&a)[4], unsigned long long x, int add) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 5}, 0; "
                 "wgmma.mma_async.sync.aligned.m64n{n_tile}k16.f32.{dtype}.{dtype} {operands};}}"
                 : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add));
}}
"""


def source_of(
    how: Launch, *, bits: int, tile_group: int, zero: int, tile_bytes: int, bfloat: bool, scale_bfloat: bool
) -> str:
    """The kernel's source for one kind of weight and x."""
    consumer_registers, producer_registers = how.registers()
    constants = {
        "BITS": bits,
        "GROUP": tile_group,
        "ZERO": zero,
        "BFLOAT": int(bfloat),
        "SCALE_BFLOAT": int(scale_bfloat),
        "N_TILE": how.n_tile,
        "WARPGROUPS": how.warpgroups,
        "RESIDENT": how.resident,
        "TILES": how.tiles,
        "STAGES": how.stages(tile_bytes),
        "SCALE_SUMS": int(how.scale_sums),
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
        "TILE_BLOCKS": how.warpgroups,
        "TEAMS": how.warpgroups,
        "TEAM_THREADS": 128,
        "ACCUMULATORS": how.n_tile // 2,
    }
    defines = "".join(f"#define {name} ({value})\n" for name, value in constants.items())
    names = ("hopper.cuh", "packed_tile.cuh", "work_list.cuh", "quantized_matmul.cu")
    parts = [Path(__file__).with_name(name).read_text() for name in names]
    return defines + _wgmma(how.n_tile, "bf16" if bfloat else "f16") + "".join(parts)


@functools.cache
def _kernel(
    how: Launch, bits: int, tile_group: int, zero: int, tile_bytes: int, bfloat: bool, scale_bfloat: bool, device: int
) -> nvrtc.Kernel:
    source = source_of(
        how,
        bits=bits,
        tile_group=tile_group,
        zero=zero,
        tile_bytes=tile_bytes,
        bfloat=bfloat,
        scale_bfloat=scale_bfloat,
    )
    shared_bytes = how.stages(tile_bytes) * how.stage_bytes(tile_bytes)
    return nvrtc.Kernel(nvrtc.compile_source(source, HOPPER), "quantized_matmul", shared_bytes=shared_bytes)


def architecture_of(device: torch.device) -> str | None:
    """What the kernel is compiled for on this device, as NVRTC names it; None where there is no kernel."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return HOPPER if (major, minor) == (9, 0) else f"sm_{major}{minor}" if major >= 8 else None


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device runs the kernel (compute capability 8.0 and up) and x of this type goes through it."""
    return dtype in (torch.float16, torch.bfloat16) and architecture_of(device) is not None


def instruction_of(device: torch.device) -> str | None:
    """With which of the tensor cores' instructions the kernel of this device multiplies; None where there is no kernel."""
    architecture = architecture_of(device)
    return None if architecture is None else "wgmma" if architecture == HOPPER else "mma.sync"


def launch(
    x: Tensor,
    weight: TiledWeight,
    how: tuple[Launch | quantized_matmul_mma.Launch, int] | None = None,
    *,
    architecture: str | None = None,
) -> Tensor:
    """y [rows, out] = x [rows, in] · Wᵀ; x contiguous, its columns in the order of the tiles.

    how: overrides the table. architecture: in place of the device's; "compute_80" is the kernel of all GPUs but Hopper's, in a
    form that a Hopper GPU runs too.
    """
    architecture = architecture or architecture_of(x.device)
    assert architecture is not None
    if architecture == HOPPER:
        assert how is None or isinstance(how[0], Launch)
        return _launch_on_hopper(x, weight, how)  # type: ignore[arg-type]
    assert how is None or isinstance(how[0], quantized_matmul_mma.Launch)
    return quantized_matmul_mma.launch(x, weight, architecture, how)  # type: ignore[arg-type]


def _launch_on_hopper(x: Tensor, weight: TiledWeight, how: tuple[Launch, int] | None) -> Tensor:
    rows, device = x.shape[0], x.device
    y = x.new_empty(rows, weight.out_features)
    if rows == 0:
        return y
    inputs = weight.in_features
    if inputs % 8 != 0:  # the copy engine wants rows of whole 16 bytes
        x, inputs = torch.nn.functional.pad(x, (0, -inputs % 8)), inputs + -inputs % 8
    if x.data_ptr() % 16 != 0:
        x = x.clone()
    partials, counters = workspace(device)
    blocks, k_tiles, tile_bytes = weight.tiles.shape
    shape, grid = how or launch_for(rows, blocks, k_tiles, tile_bytes, weight.bits, processors(device))
    row_tiles, k_stages = -(-rows // shape.n_tile), -(-k_tiles // shape.tiles)
    output_tiles = -(-blocks // shape.warpgroups) * row_tiles
    grid = min(grid, output_tiles * k_stages)
    with torch.cuda.device(device):
        bfloat, scale_bfloat = x.dtype == torch.bfloat16, weight.scale_dtype == torch.bfloat16
        kernel = _kernel(
            shape, weight.bits, weight.tile_group, weight.zero, tile_bytes, bfloat, scale_bfloat, device.index
        )
        tiles, *pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight.tiles, y, partials, counters))
        sizes = Shape(rows, weight.out_features, inputs, row_tiles, blocks, k_tiles, k_stages, -(-output_tiles // grid))
        x_map = nvrtc.tensor_map(x, box_rows=shape.n_tile)
        kernel.launch(blocks=grid, threads=shape.threads, arguments=[tiles, x_map, *pointers, sizes])
    return y


@torch.library.custom_op("tersor::prepared_matmul", mutates_args=())
def _prepared_matmul(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    scale_bfloat: bool,
    in_features: int,
    out_features: int,
) -> Tensor:
    weight = _weight(tiles, order, bits, group_size, zero, scale_bfloat, in_features, out_features)
    if not has_kernel(x.device, x.dtype):
        return torch.nn.functional.linear(x, restore(weight).dequantize(x.dtype))
    flat = x.reshape(-1, in_features)
    flat = flat.contiguous() if order is None else flat.index_select(1, order)
    return launch(flat, weight).view(*x.shape[:-1], out_features)


def _weight(
    tiles: Tensor,
    order: Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    scale_bfloat: bool,
    in_features: int,
    out_features: int,
) -> TiledWeight:
    scale_dtype = torch.bfloat16 if scale_bfloat else torch.float16
    return TiledWeight(tiles, order, bits, group_size, zero, scale_dtype, in_features, out_features)


@_prepared_matmul.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    scale_bfloat: bool,
    in_features: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, tiles, order, *ctx.rest = inputs
    ctx.save_for_backward(tiles, order)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The input's gradient only: the integers are frozen."""
    weight = restore(_weight(*ctx.saved_tensors, *ctx.rest))
    return grad @ weight.dequantize(grad.dtype), *(None,) * 8


_prepared_matmul.register_autograd(_backward, setup_context=_setup_context)


def prepared_matmul(x: Tensor, weight: TiledWeight) -> Tensor:
    """y = x · Wᵀ. x [..., in], y [..., out] in x's dtype. Differentiable in x; traceable by torch.compile.

    The first call for a kind of weight and number of rows compiles: make it before capturing a CUDA graph.
    """
    y: Tensor = _prepared_matmul(
        x,
        weight.tiles,
        weight.order,
        weight.bits,
        weight.group_size,
        weight.zero,
        weight.scale_dtype == torch.bfloat16,
        weight.in_features,
        weight.out_features,
    )
    return y
