"""The kernel of GPUs that are not Hopper's, as the code for compute capability 8.0, which every newer GPU runs too.

It computes x · Wᵀ as exactly as the reference does, measured against float64; the numbers of its launches need no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels.random_weights import random_weight
from torch import Tensor

from tersor.kernels import nvrtc, quantized_matmul_mma
from tersor.kernels.quantized_matmul import reference
from tersor.kernels.quantized_matmul_cuda import has_kernel, launch
from tersor.kernels.quantized_matmul_mma import CANDIDATES, Launch, SharedMemory, candidates, chosen, grid_for
from tersor.kernels.tiled_weight import K_TILE, N_BLOCK, prepare

ARCHITECTURE = "compute_80"
THREADS = {(8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (10, 0): 2048, (12, 0): 1536}  # of a multiprocessor
gpu = pytest.mark.gpu
needs_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernel(torch.device("cuda", 0), torch.float16)),
    reason="needs a GPU of compute capability 8.0 or newer",
)


@pytest.mark.parametrize("capability", THREADS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bfloat", [True, False])
@pytest.mark.parametrize(
    "per_group", [2, 12]
)  # bytes of scales and zero points an output and tile: one group, and four
def test_every_candidate_fits_on_a_multiprocessor(
    capability: tuple[int, int], bits: int, bfloat: bool, per_group: int
) -> None:
    tile_bytes, shared = N_BLOCK * (K_TILE * bits // 8 + per_group), SharedMemory.of(capability)
    for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 1000):
        found = candidates(rows, tile_bytes, bits, bfloat, shared)
        assert len({str(how) for how in found}) == len(found)
        for how in found:
            assert how.n_tile >= min(rows, 64)
            assert not (how.zero_sums and bits == 8 and bfloat)
            assert 2 * how.tiles % how.warps_in == 0
            stages = how.stages(tile_bytes, shared)
            block_bytes = stages * how.stage_bytes(tile_bytes) + how.exchange_bytes()
            assert stages >= 2
            assert block_bytes <= shared.block
            assert how.resident * (block_bytes + 1024) <= shared.processor
            assert how.resident * how.threads <= THREADS[capability]
            for blocks, k_tiles in ((1, 1), (8, 9), (224, 32), (768, 96)):
                assert 1 <= grid_for(how, rows, blocks, k_tiles, 84) <= 84 * how.resident


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def assert_as_good_as_reference(
    rows: int, weight_of: dict[str, int | bool], shape: tuple[int, int], dtype: torch.dtype, how: Launch | None = None
) -> None:
    weight = random_weight(*shape, device="cuda", **weight_of)  # type: ignore[arg-type]
    prepared = prepare(weight)
    x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
    exact = x.double() @ weight.dequantize(torch.float64).t()
    in_order = x if prepared.order is None else x.index_select(1, prepared.order)
    torch.full((rows, shape[0]), float("nan"), dtype=dtype, device="cuda")  # freed at once: the output's memory to be
    y = launch(in_order, prepared, None if how is None else (how, 100), architecture=ARCHITECTURE)
    assert y.dtype == dtype
    # Where codes are scaled in bfloat16 they are rounded twice, the reference rounds once: hence the margin.
    assert relative_error(y, exact) < 1.35 * relative_error(reference(x, weight), exact)


# Every bits with every group size; numbers of rows, symmetry and types take turns.
KINDS = [
    (
        bits,
        group_size,
        (b + g) % 2 == 0,
        (torch.float16, torch.bfloat16)[(b // 2 + g) % 2],
        (1, 13, 40, 64)[(b + 3 * g) % 4],
    )
    for b, bits in enumerate((2, 3, 4, 8))
    for g, group_size in enumerate((32, 64, 128, 256, -1))
]


@gpu
@needs_kernel
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "dtype", "rows"), KINDS)
def test_every_kind_of_weight(bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, rows: int) -> None:
    kind = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    assert_as_good_as_reference(rows, kind, (544, 1056), dtype)


@gpu
@needs_kernel
@pytest.mark.parametrize("shape", [(96, 288), (77, 200), (64, 84), (1000, 4224), (64, 12288), (8192, 8192)])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 33, 64, 100, 300])
def test_every_shape_and_number_of_rows(rows: int, shape: tuple[int, int]) -> None:
    assert_as_good_as_reference(rows, {"bits": 4, "group_size": -1, "symmetric": True}, shape, torch.float16)


@gpu
@needs_kernel
@pytest.mark.parametrize(
    "how",
    [
        Launch(8, 4, 1, warps_in=4, tiles=2, zero_sums=True),
        Launch(16, 1, 8),
        Launch(32, 2, 4, warps_in=2, tiles=2, scale_sums=False),
        Launch(128, 2, 4, scale_sums=False),
    ],
)
def test_launches_beyond_the_table(how: Launch) -> None:
    kind = {"bits": 4, "group_size": 64}
    assert_as_good_as_reference(24, kind, (1056, 2080), torch.float16, how)
    assert_as_good_as_reference(5, {**kind, "bits": 3}, (320, 2080), torch.bfloat16, replace(how, most_stages=2))


@gpu
@needs_kernel
@pytest.mark.parametrize("how", dict.fromkeys(how for cuts in CANDIDATES.values() for how in cuts))
def test_every_candidate(how: Launch) -> None:
    assert_as_good_as_reference(2 * how.n_tile - 3, {"bits": 4, "group_size": 128}, (1056, 2080), torch.float16, how)


@gpu
@needs_kernel
def test_a_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    weight = prepare(random_weight(4096, 4096, bits=4, group_size=128, device="cuda"))
    x = torch.randn(3, 4096, dtype=torch.float16, device="cuda")
    monkeypatch.setattr(quantized_matmul_mma, "_chosen", {})
    assert chosen(3, x.dtype, weight, ARCHITECTURE) is None
    y = launch(x, weight, architecture=ARCHITECTURE)
    first = chosen(3, x.dtype, weight, ARCHITECTURE)
    assert first in {str(how) for how in CANDIDATES[8]}
    assert chosen(8, x.dtype, weight, ARCHITECTURE) == first
    (kept,) = tmp_path.glob("choice-*.json")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(quantized_matmul_mma, "_chosen", {})  # as in another process
    assert torch.equal(launch(x, weight, architecture=ARCHITECTURE), y)
    assert chosen(3, x.dtype, weight, ARCHITECTURE) == first
    assert kept.stat().st_mtime_ns == before


@gpu
@needs_kernel
@pytest.mark.parametrize("rows", [1, 64, 200])
def test_activation_order(rows: int) -> None:
    kind = {"bits": 4, "group_size": 128, "shuffled": True}
    assert_as_good_as_reference(rows, kind, (512, 1024), torch.float16)


@gpu
@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_made_dense_for_many_rows(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(544, 1056, bits=bits, group_size=32, device="cuda")
    x = torch.randn(70, 1056, dtype=dtype, device="cuda")
    y = x.new_empty(70, 544)
    monkeypatch.setattr(quantized_matmul_mma, "DENSE_BYTES", 3 * N_BLOCK * 9 * K_TILE * 2)  # in three pieces
    quantized_matmul_mma._by_dense(x, prepare(weight), y, ARCHITECTURE)
    torch.testing.assert_close(y, reference(x, weight), rtol=2e-2, atol=2e-2)


@gpu
@needs_kernel
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_the_same_bits_every_time(rows: int) -> None:
    weight = prepare(random_weight(4096, 4096, bits=4, group_size=128, device="cuda"))
    x = torch.randn(rows, 4096, dtype=torch.float16, device="cuda")
    first = launch(x, weight, architecture=ARCHITECTURE)
    assert all(torch.equal(launch(x, weight, architecture=ARCHITECTURE), first) for _ in range(20))


@gpu
@needs_kernel
def test_a_captured_graph_replays_with_new_input() -> None:
    weight = prepare(random_weight(4096, 4096, bits=4, group_size=128, device="cuda"))
    x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
    launch(x, weight, architecture=ARCHITECTURE)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = launch(x, weight, architecture=ARCHITECTURE)
        y = launch(hidden / 100, weight, architecture=ARCHITECTURE)
    x.normal_()
    graph.replay()
    hidden = launch(x, weight, architecture=ARCHITECTURE)
    assert torch.equal(y, launch(hidden / 100, weight, architecture=ARCHITECTURE))
