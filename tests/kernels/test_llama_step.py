"""The kernel for a step of all layers compiles for every kind of weight (tests/runtime/test_llama_gpu.py runs it)."""

from pathlib import Path

import pytest

from tersor.kernels import nvrtc
from tersor.kernels.llama_step import MIN_STAGES, Sizes, _Kind, _stages, source_of

LLAMA_8B = Sizes(hidden=4096, inner=14336, heads=32, kv_heads=8, width=128, layers=32)
QWEN_7B = Sizes(hidden=3584, inner=18944, heads=28, kv_heads=4, width=128, layers=28)
LLAMA_70B = Sizes(hidden=8192, inner=28672, heads=64, kv_heads=8, width=128, layers=80)
SMALL = Sizes(hidden=320, inner=832, heads=12, kv_heads=1, width=64, layers=2)
DENSE = _Kind(16)
FOUR = _Kind(4, 128, 8, 4096 + 128)
THREE_ASYMMETRIC = _Kind(3, 32, -1, 3072 + 512 + 256, scale_bfloat=True)


@pytest.mark.parametrize("bfloat", [True, False])
@pytest.mark.parametrize(
    ("sizes", "kind"), [(LLAMA_8B, FOUR), (QWEN_7B, DENSE), (LLAMA_70B, THREE_ASYMMETRIC), (SMALL, FOUR)]
)
def test_compiles_and_fits_in_shared_memory(
    sizes: Sizes, kind: _Kind, bfloat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        nvrtc._nvrtc()
    except RuntimeError:
        pytest.skip("NVRTC is not installed")
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    assert _stages(sizes, kind) >= MIN_STAGES
    # A static assertion in the source compares the shared memory that is counted here with what is used there.
    cubin = nvrtc.compile_source(source_of(sizes, kind, bfloat=bfloat, eps=1e-5, blocks=132), "sm_90a")
    assert b"llama_step" in cubin
