"""The quantized matmul on NVIDIA GPUs that are not Hopper (compute capability 8.0 and up): cuts and launches
`quantized_matmul_mma.cu`.

Which cut is the fastest is measured on the GPU at hand, once for each kind and shape of weight and number of rows; with many
rows, turning the weight into a dense one and multiplying by cuBLAS is one of the candidates.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import choices, nvrtc
from tersor.kernels.tiled_weight import K_TILE, N_BLOCK, TiledWeight
from tersor.kernels.work_list import Shape, processors, workspace

MOST_STAGES, FEWEST_STAGES = 6, 3
DENSE_ROWS = 64  # with more, a dense weight and cuBLAS may be faster
MEASURED_BYTES = 4 * 2**20  # of tiles; smaller weights take the first cut
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

    def __str__(self) -> str:
        """Short: rows, strips x warps along outputs and inputs, tiles a stage, thread blocks a multiprocessor, and what else."""
        sums = "" if self.scale_sums else " scaled codes"
        zeros = " zeros by sums" if self.zero_sums else ""
        stages = "" if self.most_stages == MOST_STAGES else f" {self.most_stages} stages"
        warps = f"{self.strips} x {self.warps_out} x {self.warps_in}"
        return f"{self.n_tile}: {warps}, {self.tiles} tiles, {self.resident} blocks{sums}{zeros}{stages}"

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


# What is measured against each other, by n_tile. The first is taken where nothing is measured: on an H200 it was within a tenth
# of the fastest in every shape of the benchmark. Those behind it won somewhere, or are for GPUs with less shared memory.
CANDIDATES: dict[int, tuple[Launch, ...]] = {
    8: (
        Launch(8, 2, 4, warps_in=2, tiles=2, resident=2),
        Launch(8, 2, 4, warps_in=2, tiles=2, resident=3, zero_sums=True),
        Launch(8, 1, 8, tiles=2, resident=2),
        Launch(8, 4, 2, warps_in=4, tiles=2, resident=2, zero_sums=True),
        Launch(8, 2, 4, warps_in=2, tiles=2, resident=2, zero_sums=True),
        Launch(8, 4, 4, warps_in=2, tiles=2, zero_sums=True),
    ),
    16: (
        Launch(16, 2, 4, warps_in=2, tiles=2, resident=2),
        Launch(16, 1, 8, tiles=2, resident=2),
        Launch(16, 2, 4, warps_in=2, tiles=2, resident=2, zero_sums=True),
        Launch(16, 4, 2, warps_in=4, tiles=2, resident=2, zero_sums=True),
    ),
    32: (
        Launch(32, 2, 4, tiles=2, resident=2),
        Launch(32, 2, 4, warps_in=2, tiles=2, resident=2, scale_sums=False),
        Launch(32, 2, 8),
    ),
    64: (
        Launch(64, 2, 4, resident=2),
        Launch(64, 2, 8),
        Launch(64, 2, 8, scale_sums=False),
    ),
    128: (Launch(128, 2, 8, scale_sums=False), Launch(128, 2, 4, scale_sums=False)),
}


@functools.cache
def candidates(rows: int, tile_bytes: int, bits: int, bfloat: bool, shared: SharedMemory) -> tuple[Launch, ...]:
    """The launches for x of `rows` rows and tiles of this size that fit into shared memory; at least one."""
    n_tile = next((n for n in CANDIDATES if rows <= n), max(CANDIDATES))
    found = [_fitting(how, tile_bytes, shared) for how in CANDIDATES[n_tile]]
    found[1:] = [how for how in found[1:] if how.stages(tile_bytes, shared) >= FEWEST_STAGES]
    if bits == 8 and bfloat:  # has no raw pairs
        found = [replace(how, zero_sums=False) for how in found]
    return tuple(dict.fromkeys(found))


def _fitting(how: Launch, tile_bytes: int, shared: SharedMemory) -> Launch:
    """With enough stages, or at least as many as can be."""
    while how.stages(tile_bytes, shared) < FEWEST_STAGES:
        smaller = _smaller(how)
        if smaller is None:
            break
        how = smaller
    return how


def _smaller(how: Launch) -> Launch | None:
    """The next launch whose stages take less of the shared memory."""
    if how.tiles > 1 and how.tiles % how.warps_in == 0:
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
        if how is None:
            _run(_choice(x, weight, y, architecture), x, weight, y, architecture)
        else:
            _packed(x, weight, y, architecture, *how)
    return y


def _packed(x: Tensor, weight: TiledWeight, y: Tensor, architecture: str, cut: Launch, grid: int) -> None:
    rows, inputs = x.shape
    partials, counters = workspace(x.device)
    blocks, k_tiles, tile_bytes = weight.tiles.shape
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
        arguments: list[ctypes.c_void_p | ctypes.c_int] = [ctypes.c_void_p(t.data_ptr()) for t in (tiles, dense)]
        arguments.append(ctypes.c_int(k_tiles))
        kernel.launch(blocks=len(tiles) * k_tiles, threads=128, arguments=arguments, early=False)
        outputs = y[:, first * N_BLOCK : (first + step) * N_BLOCK]
        torch.mm(x, dense[: outputs.shape[1], : x.shape[1]].t(), out=outputs)


DENSE = "dense, then cuBLAS"
_Way = Launch | str  # a launch, or DENSE
_chosen: dict[tuple[object, ...], _Way] = {}  # by GPU, kind and shape of weight, and rows


def _run(way: _Way, x: Tensor, weight: TiledWeight, y: Tensor, architecture: str) -> None:
    if isinstance(way, str):
        return _by_dense(x, weight, y, architecture)
    blocks, k_tiles, _ = weight.tiles.shape
    grid = grid_for(way, x.shape[0], blocks, k_tiles, processors(x.device))
    return _packed(x, weight, y, architecture, way, grid)


def _key(rows: int, dtype: torch.dtype, weight: TiledWeight, architecture: str) -> tuple[object, ...]:
    bucket = next((n for n in CANDIDATES if rows <= n), 1 << (rows - 1).bit_length())
    return weight.tiles.device, architecture, dtype, _kind_of(weight), tuple(weight.tiles.shape), bucket


def _choice(x: Tensor, weight: TiledWeight, y: Tensor, architecture: str) -> _Way:
    """The fastest way for about so many rows, measured with the first such x or by a process before.

    The first candidate for weights too small to matter, and for what is not measured yet while a graph is captured.
    """
    rows, device, bfloat, kind = x.shape[0], x.device, x.dtype == torch.bfloat16, _kind_of(weight)
    at = _key(rows, x.dtype, weight, architecture)
    if at in _chosen:
        return _chosen[at]
    shared, tile_bytes = SharedMemory.of(torch.cuda.get_device_capability(device)), weight.tiles.shape[2]
    launches = candidates(rows, tile_bytes, weight.bits, bfloat, shared)
    ways: list[_Way] = [*launches, *([DENSE] if rows > DENSE_ROWS else [])]
    if weight.tiles.nbytes < MEASURED_BYTES or len(ways) == 1:
        return _chosen.setdefault(at, ways[0])
    by_name = {str(way): way for way in ways}
    sources = [source_of(how, how.stages(tile_bytes, shared), kind, bfloat=bfloat) for how in launches]
    code = hashlib.sha256("".join(sources).encode()).hexdigest()[:16]
    asked = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {at[1:]}, kernels {code}"
    known = choices.recall(asked, list(by_name))
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return ways[0]
        with ThreadPoolExecutor(len(sources)) as pool:  # into the cache, all at once
            list(pool.map(lambda source: nvrtc.compile_source(source, architecture), sources))
        runs = [functools.partial(_run, way, x, weight, y, architecture) for way in ways]
        measured = dict(zip(by_name, choices.gpu_microseconds(runs, device), strict=True))
        choices.keep(asked, measured)
        known = min(measured, key=lambda name: measured[name])
    return _chosen.setdefault(at, by_name[known])


def chosen(rows: int, dtype: torch.dtype, weight: TiledWeight, architecture: str) -> str | None:
    """What runs x of so many rows and this type in this process, in words; None before the first."""
    way = _chosen.get(_key(rows, dtype, weight, architecture))
    return None if way is None else str(way)
