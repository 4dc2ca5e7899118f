"""The quantized matmul on NVIDIA GPUs that are not Hopper (compute capability 8.0 and up): cuts and launches
`quantized_matmul_mma.cu`.

With many rows it may be faster to turn the weight into a dense one and multiply by cuBLAS: which of the two is measured on the
GPU at hand, once for each shape and power of two of rows.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import nvrtc
from tersor.kernels.tiled_weight import K_TILE, N_BLOCK, TiledWeight
from tersor.kernels.work_list import Shape, processors, workspace

MOST_STAGES, FEWEST_STAGES = 6, 3
MEASURED_ROWS = 64  # with more, both ways are measured
MEASURED_CALLS = 5
DENSE_BYTES = 256 * 2**20  # of a weight that are dense at once
BLOCK_RESERVED_BYTES = 1024  # of shared memory, by the system

# By compute capability, in KiB: shared memory of a multiprocessor and the most a block can have. Others have at least 100 and 99.
_SHARED = {
    (8, 0): (164, 163), (8, 7): (164, 163), (9, 0): (228, 227),
    (10, 0): (228, 227), (10, 3): (228, 227), (11, 0): (228, 227),
}  # fmt: skip


@dataclass(frozen=True)
class SharedMemory:
    """Bytes of shared memory: of a multiprocessor, and the most that one block can have."""

    processor: int
    block: int

    @classmethod
    def of(cls, capability: tuple[int, int]) -> SharedMemory:
        processor, block = _SHARED.get(capability, (100, 99))
        return cls(processor * 1024, block * 1024)


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut.

    n_tile: rows of x that share one pass over the weight, a multiple of 8 up to 128.
    strips: of 16 outputs a warp: 1, 2 or 4.
    warps_out: warps along the outputs; strips * warps_out is a multiple of 4.
    warps_in: warps along the inputs of a stage, each with a half of a tile or with whole ones.
    tiles: of 128 inputs each, in a pipeline stage.
    resident: thread blocks that fit on a multiprocessor.
    scale_sums: scale a group's sums, not its codes. Takes strips * n_tile / 2 registers more and saves arithmetic and power.
    zero_sums: subtract a group's zero point from its sums, not from its codes (needs scale_sums; not for 8 bits in bfloat16).
        Takes 1 / strips more work of the tensor cores and saves arithmetic.
    most_stages: of the pipeline.
    """

    n_tile: int
    strips: int
    warps_out: int
    warps_in: int = 1
    tiles: int = 1
    resident: int = 1
    scale_sums: bool = True
    zero_sums: bool = False
    most_stages: int = MOST_STAGES

    @property
    def threads(self) -> int:
        return 32 * self.warps_out * self.warps_in

    @property
    def blocks(self) -> int:
        """Blocks of 64 outputs in an output tile."""
        return self.strips * self.warps_out // 4

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return self.strips * self.n_tile // 2

    def stage_bytes(self, tile_bytes: int) -> int:
        size = self.tiles * (self.n_tile * K_TILE * 2 + self.blocks * tile_bytes)
        return -(-size // 128) * 128

    def exchange_bytes(self) -> int:
        """Through which warps along the inputs add up, 16 sums of a thread at a time."""
        return (self.warps_in - 1) * self.warps_out * 32 * min(self.sums, 16) * 4

    def stages(self, tile_bytes: int, shared: SharedMemory) -> int:
        static = BLOCK_RESERVED_BYTES + 128  # the kernel's own few variables, and alignment
        room = min(shared.processor // self.resident, shared.block + BLOCK_RESERVED_BYTES) - static
        return min(self.most_stages, (room - self.exchange_bytes()) // self.stage_bytes(tile_bytes))


@functools.cache
def launch_for(
    rows: int, blocks: int, k_tiles: int, tile_bytes: int, bits: int, multiprocessors: int, shared: SharedMemory
) -> tuple[Launch, int]:
    """The launch for x of `rows` rows and a weight of [blocks, k_tiles] tiles, and its number of thread blocks.

    The table comes from measuring the candidates on an H200, compiled for compute capability 8.0.
    """
    if rows <= 16:
        how = Launch(8 if rows <= 8 else 16, 2, 4, warps_in=2, tiles=2, resident=2)
    elif rows <= 32:
        how = Launch(32, 2, 4, warps_in=2, tiles=2, resident=1)
    elif rows <= 64:
        how = Launch(64, 2, 8)
    else:
        how = Launch(128, 2, 8, scale_sums=False)
    while how.stages(tile_bytes, shared) < FEWEST_STAGES:
        smaller = _smaller(how)
        if smaller is None:
            break
        how = smaller
    return how, grid_for(how, rows, blocks, k_tiles, multiprocessors)


def _smaller(how: Launch) -> Launch | None:
    """The next launch whose stages take less of the shared memory."""
    if how.tiles > 1:
        return replace(how, tiles=how.tiles // 2)
    if how.resident > 1:
        return replace(how, resident=1)
    if how.n_tile == 128:
        return replace(how, n_tile=64, scale_sums=True)
    if how.warps_out > 4:
        return replace(how, warps_out=4)
    return None


def grid_for(how: Launch, rows: int, blocks: int, k_tiles: int, multiprocessors: int) -> int:
    """Thread blocks: a run of stages for each that fits, or whole output tiles where those fill the machine."""
    output_tiles, most = -(-blocks // how.blocks) * -(-rows // how.n_tile), multiprocessors * how.resident
    if how.n_tile >= 64:  # sharing a tile among blocks costs a pass over its sums through memory
        rounds = -(-output_tiles // most)
        if output_tiles > 0.9 * rounds * most:
            return -(-output_tiles // rounds)
    return min(most, output_tiles * -(-k_tiles // how.tiles))


def _tile_constants(weight_kind: tuple[int, int, int, bool], bfloat: bool) -> dict[str, int]:
    bits, tile_group, zero, scale_bfloat = weight_kind
    return {"BITS": bits, "GROUP": tile_group, "ZERO": zero, "BFLOAT": int(bfloat), "SCALE_BFLOAT": int(scale_bfloat)}


def _source(constants: dict[str, int], *names: str) -> str:
    defines = "".join(f"#define {name} ({value})\n" for name, value in constants.items())
    return defines + "".join(Path(__file__).with_name(name).read_text() for name in names)


def source_of(how: Launch, stages: int, weight_kind: tuple[int, int, int, bool], *, bfloat: bool) -> str:
    """The kernel's source. weight_kind: bits, columns that share a scale in a tile, zero point, scales in bfloat16."""
    constants = {
        **_tile_constants(weight_kind, bfloat),
        "N_TILE": how.n_tile,
        "STRIPS": how.strips,
        "WARPS_OUT": how.warps_out,
        "WARPS_IN": how.warps_in,
        "RESIDENT": how.resident,
        "TILES": how.tiles,
        "SCALE_SUMS": int(how.scale_sums),
        "ZERO_SUMS": int(how.zero_sums),
        "STAGES": stages,
        "TILE_BLOCKS": how.blocks,
        "TEAMS": how.warps_out,
        "TEAM_THREADS": 32,
        "ACCUMULATORS": how.sums,
    }
    return _source(constants, "hopper.cuh", "packed_tile.cuh", "work_list.cuh", "quantized_matmul_mma.cu")


def dense_source_of(weight_kind: tuple[int, int, int, bool], *, bfloat: bool) -> str:
    """The source of the kernel that turns tiles into a dense weight."""
    return _source(
        {**_tile_constants(weight_kind, bfloat), "SCALE_SUMS": 0},
        "hopper.cuh",
        "packed_tile.cuh",
        "dequantize_tiles.cu",
    )


def _kind_of(weight: TiledWeight) -> tuple[int, int, int, bool]:
    return weight.bits, weight.tile_group, weight.zero, weight.scale_dtype == torch.bfloat16


@functools.cache
def _kernel(
    how: Launch,
    weight_kind: tuple[int, int, int, bool],
    tile_bytes: int,
    bfloat: bool,
    architecture: str,
    device: torch.device,
) -> nvrtc.Kernel:
    stages = how.stages(tile_bytes, SharedMemory.of(torch.cuda.get_device_capability(device)))
    if stages < 2:
        raise ValueError(f"{how} needs more shared memory than {torch.cuda.get_device_name(device)} has")
    source = source_of(how, stages, weight_kind, bfloat=bfloat)
    shared_bytes = stages * how.stage_bytes(tile_bytes) + how.exchange_bytes()
    return nvrtc.Kernel(nvrtc.compile_source(source, architecture), "quantized_matmul_mma", shared_bytes=shared_bytes)


@functools.cache
def _dense_kernel(
    weight_kind: tuple[int, int, int, bool], bfloat: bool, architecture: str, device: torch.device
) -> nvrtc.Kernel:
    source = dense_source_of(weight_kind, bfloat=bfloat)
    return nvrtc.Kernel(nvrtc.compile_source(source, architecture), "dequantize_tiles", shared_bytes=0)


def waits_itself(architecture: str) -> bool:
    """Whether the kernel, compiled for this, can be launched before the one ahead of it has ended."""
    return int(architecture.partition("_")[2].rstrip("af")) >= 90


def launch(x: Tensor, weight: TiledWeight, architecture: str, how: tuple[Launch, int] | None = None) -> Tensor:
    """y [rows, out] = x [rows, in] · Wᵀ; x contiguous, its columns in the order of the tiles.

    architecture: as NVRTC names it: "sm_80", or "compute_80" for code that the driver turns into any newer GPU's. `how`: a launch
    and its thread blocks, in place of the measured choice.
    """
    rows, device = x.shape[0], x.device
    y = x.new_empty(rows, weight.out_features)
    if rows == 0:
        return y
    if x.shape[1] % 8 != 0:  # copies are of 16 bytes
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    if x.data_ptr() % 16 != 0:
        x = x.clone()
    with torch.cuda.device(device):
        if how is None and _dense_is_faster(x, weight, y, architecture):
            _by_dense(x, weight, y, architecture)
        else:
            _packed(x, weight, y, architecture, how)
    return y


def _packed(x: Tensor, weight: TiledWeight, y: Tensor, architecture: str, how: tuple[Launch, int] | None) -> None:
    rows, inputs = x.shape
    partials, counters = workspace(x.device)
    blocks, k_tiles, tile_bytes = weight.tiles.shape
    shared = SharedMemory.of(torch.cuda.get_device_capability(x.device))
    cut, grid = how or launch_for(rows, blocks, k_tiles, tile_bytes, weight.bits, processors(x.device), shared)
    row_tiles, k_stages = -(-rows // cut.n_tile), -(-k_tiles // cut.tiles)
    output_tiles = -(-blocks // cut.blocks) * row_tiles
    grid = min(grid, output_tiles * k_stages)
    kernel = _kernel(cut, _kind_of(weight), tile_bytes, x.dtype == torch.bfloat16, architecture, x.device)
    sizes = Shape(rows, weight.out_features, inputs, row_tiles, blocks, k_tiles, k_stages, -(-output_tiles // grid))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight.tiles, x, y, partials, counters)]
    early = waits_itself(architecture)
    kernel.launch(blocks=grid, threads=cut.threads, arguments=[*pointers, sizes], early=early)


def _by_dense(x: Tensor, weight: TiledWeight, y: Tensor, architecture: str) -> None:
    """By cuBLAS, from pieces of the weight that are dense one after the other."""
    blocks, k_tiles, _ = weight.tiles.shape
    step = max(1, DENSE_BYTES // (N_BLOCK * k_tiles * K_TILE * 2))
    dense = x.new_empty(min(step, blocks) * N_BLOCK, k_tiles * K_TILE)
    kernel = _dense_kernel(_kind_of(weight), x.dtype == torch.bfloat16, architecture, x.device)
    for first in range(0, blocks, step):
        tiles = weight.tiles[first : first + step]
        arguments = [ctypes.c_void_p(tiles.data_ptr()), ctypes.c_void_p(dense.data_ptr()), ctypes.c_int(k_tiles)]
        kernel.launch(blocks=len(tiles) * k_tiles, threads=128, arguments=arguments, early=False)
        outputs = y[:, first * N_BLOCK : (first + step) * N_BLOCK]
        torch.mm(x, dense[: outputs.shape[1], : x.shape[1]].t(), out=outputs)


_measured: dict[tuple[object, ...], bool] = {}  # by GPU, kind and shape of weight, and rows


def _dense_is_faster(x: Tensor, weight: TiledWeight, y: Tensor, architecture: str) -> bool:
    """Measured with the first x of about so many rows; what is not measured yet while a graph is captured stays packed."""
    rows = x.shape[0]
    if rows <= MEASURED_ROWS:
        return False
    at = (x.device, architecture, x.dtype, _kind_of(weight), *weight.tiles.shape, (rows - 1).bit_length())
    if at not in _measured and not torch.cuda.is_current_stream_capturing():
        packed = _milliseconds(lambda: _packed(x, weight, y, architecture, None))
        _measured[at] = _milliseconds(lambda: _by_dense(x, weight, y, architecture)) < packed
    return _measured.get(at, False)


def _milliseconds(run: Callable[[], None]) -> float:
    run()  # compiles
    times = []
    for _ in range(MEASURED_CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
