"""CUDA sources compile for every kind of weight, wherever NVRTC is; what they compute is tested where there is a GPU."""

from pathlib import Path

import pytest

from tersor.kernels import gptq_block, llama_step, nvrtc, quantized_matmul_cuda
from tersor.kernels import quantized_matmul_mma as mma
from tersor.kernels.gptq_block import Grids
from tersor.kernels.llama_step import MIN_STAGES, Sizes, _Kind, _stages
from tersor.kernels.quantized_matmul_cuda import Launch

LLAMA_8B = Sizes(hidden=4096, inner=14336, heads=32, kv_heads=8, width=128, layers=32)
QWEN_7B = Sizes(hidden=3584, inner=18944, heads=28, kv_heads=4, width=128, layers=28)
LLAMA_70B = Sizes(hidden=8192, inner=28672, heads=64, kv_heads=8, width=128, layers=80)
SMALL = Sizes(hidden=320, inner=832, heads=12, kv_heads=1, width=64, layers=2)
DENSE = _Kind(16)
FOUR = _Kind(4, 128, 8, 4096 + 128)
THREE_ASYMMETRIC = _Kind(3, 32, -1, 3072 + 512 + 256, scale_bfloat=True)


@pytest.fixture(autouse=True)
def needs_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        nvrtc._nvrtc()
    except RuntimeError:
        pytest.skip("NVRTC is not installed")
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)


@pytest.mark.parametrize(
    ("sizes", "kind", "bfloat"),
    [(LLAMA_8B, FOUR, True), (QWEN_7B, DENSE, False), (LLAMA_70B, THREE_ASYMMETRIC, True), (SMALL, FOUR, False)],
)
def test_a_step_of_all_layers_fits_in_shared_memory(sizes: Sizes, kind: _Kind, bfloat: bool) -> None:
    assert _stages(sizes, kind) >= MIN_STAGES
    # A static assertion in the source compares the shared memory that is counted here with what is used there.
    source = llama_step.source_of(sizes, kind, bfloat=bfloat, eps=1e-5, blocks=132)
    assert b"llama_step" in nvrtc.compile_source(source, "sm_90a")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (Launch(8, 3, 2, 2, True), FOUR),
        (Launch(64, 3, scale_sums=True), THREE_ASYMMETRIC),
        (Launch(256, 2), _Kind(8, 64, 128, 8192 + 256)),
    ],
)
def test_the_matmul(how: Launch, kind: _Kind) -> None:
    source = quantized_matmul_cuda.source_of(
        how, bits=kind.bits, tile_group=kind.group, zero=kind.zero, tile_bytes=kind.tile_bytes, bfloat=True,
        scale_bfloat=kind.scale_bfloat,
    )  # fmt: skip
    assert b"quantized_matmul" in nvrtc.compile_source(source, "sm_90a")


@pytest.mark.parametrize(
    ("arch", "how", "kind", "bfloat"),
    [
        ("sm_80", mma.Launch(8, 2, 4, warps_in=2, tiles=2, resident=2), (4, 128, 8, False), False),
        ("sm_86", mma.Launch(16, 2, 4), (3, 32, -1, True), True),
        ("sm_89", mma.Launch(32, 1, 4, warps_in=2), (8, 64, 128, False), True),
        ("sm_100", mma.Launch(8, 4, 1, warps_in=4, tiles=2, zero_sums=True), (2, 128, -1, False), False),
        ("sm_120", mma.Launch(64, 2, 4, scale_sums=False), (4, 64, -1, False), True),
        ("compute_80", mma.Launch(8, 2, 4, zero_sums=True), (3, 128, 4, False), True),
    ],
)
def test_the_matmul_of_other_gpus(arch: str, how: mma.Launch, kind: tuple[int, int, int, bool], bfloat: bool) -> None:
    source = mma.source_of(how, 3, kind, bfloat=bfloat)
    assert b"quantized_matmul_mma" in nvrtc.compile_source(source, arch)
    assert b"dequantize_tiles" in nvrtc.compile_source(mma.dense_source_of(kind, bfloat=bfloat), arch)


@pytest.mark.parametrize("grids", [Grids(4), Grids("ternary", sym=True, group_size=64)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_loop_over_columns(grids: Grids, arch: str) -> None:
    assert b"gptq_block" in nvrtc.compile_source(gptq_block.source_of(grids), arch)
