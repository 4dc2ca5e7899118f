"""Any transformers model is quantized, saved, loaded again and run, without a definition of any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo.tiny_models import MODELS, build, samples

import tersor
from tersor import GPTQ
from tersor.calibrate.batches import first_tensor

QUICK = ("llama", "gpt2", "mixtral", "bert", "whisper", "falcon_h1")


def each_type(test):  # type: ignore[no-untyped-def]
    marked = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
    return pytest.mark.parametrize("name", marked)(test)


@each_type
def test_is_quantized_saved_and_loaded_with_the_same_output(name: str, tmp_path: Path) -> None:
    tiny, batches = MODELS[name], samples(name, 6)
    original = build(name)
    original.save_pretrained(tmp_path / "original")
    method = GPTQ(bits=4, group_size=32)
    result = tersor.compress(tmp_path / "original", method, calibration=batches, out=tmp_path / "out")

    assert result.summary.format == tiny.format
    if tiny.expects is not None:
        assert len(result.summary.layers) == tiny.expects
    assert all(layer.note == "" for layer in result.summary.layers)
    with torch.no_grad():
        before = first_tensor(original(**batches[0]))
        after = first_tensor(result.model(**batches[0]))
    assert before is not None
    assert after is not None
    assert 0 < float((after - before).norm() / before.norm()) < 0.5

    in_memory = tersor.compress(original, method, calibration=batches)
    with torch.no_grad():
        same = first_tensor(in_memory.model(**batches[0]))
    torch.testing.assert_close(same, after, rtol=1e-4, atol=1e-5)
    in_memory.save(tmp_path / "saved")
    with torch.no_grad():
        again = first_tensor(tersor.load(tmp_path / "saved")(**batches[0]))
    torch.testing.assert_close(again, same, rtol=1e-4, atol=1e-5)  # kernels add up in another order


def test_experts_are_stored_under_their_published_names(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    tersor.compress(tmp_path / "model", GPTQ(group_size=32), calibration=samples("mixtral", 2), out=tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.1.block_sparse_moe.experts.3.w2.qweight" in names
    assert not any(name.endswith("w2.weight") for name in names)


def test_part_of_a_fused_stack_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(tersor.TersorError, match="as a whole"):
        tersor.compress(
            build("mixtral"),
            GPTQ(group_size=32),
            calibration=samples("mixtral", 2),
            exclude=["*experts.gate_up_proj.1"],
        )
