"""Layers that are hard to solve, and models that overflow: what is done about it, and that the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_json, change_tensors
from torch import nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ
from tersor.checkpoint.writer import ResultWriter
from tersor.compress.result import Compressed
from tersor.errors import NotFiniteError, TersorError
from tersor.methods.block import LayerReport


def solved(x: list[torch.Tensor], damp: float) -> LayerReport:
    """How the first layer of a model is reported that is calibrated with samples x."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    result = tersor.compress(model, GPTQ(group_size=32, damp=damp), calibration=x, include=["0"], format=None)
    return result.summary.layers[0]


def twins() -> list[torch.Tensor]:
    """Two samples of a token, one with 1 in its first two inputs: H is 1 there, the second pivot 1 - 1, 0 on every processor."""
    x = torch.zeros(2, 1, 32)
    x[0, 0, :2] = 1
    return list(x)


def test_damping_that_had_to_be_raised_is_reported_with_the_layer() -> None:
    """1 + 1e-17 is 1 even in float64."""
    layer = solved(twins(), damp=1e-17)
    assert 1e-17 < layer.damp < 1e-13
    assert f"damping raised to {layer.damp:g}" in layer.note


def test_a_layer_that_took_float64_is_reported() -> None:
    layer = solved(twins(), damp=1e-9)
    assert (layer.note, layer.damp) == ("factorized in float64", 1e-9)


def test_nothing_is_reported_of_a_layer_that_is_solved_as_asked() -> None:
    layer = solved([torch.randn(200, 32)], damp=0.01)
    assert (layer.note, layer.damp) == ("", 0.01)


# ---- models that overflow float16


@pytest.fixture
def overflowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float16 checkpoint of which the second block overflows for one token only, where float16 would be chosen: as on a GPU."""
    model: Any = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50, 0] = 1000  # after the norm this token has 8 here, and others about 1
        for name in ("gate_proj", "up_proj"):
            getattr(model.model.layers[1].mlp, name).weight[:, 0] = 60
    model.half().save_pretrained(tmp_path / "model")
    real = tersor.compress.stream.compute_dtype  # type: ignore[attr-defined]

    def as_on_a_gpu(checkpoint: Any, device: Any, dtype: str = "auto") -> torch.dtype:
        return torch.float16 if dtype == "auto" else real(checkpoint, device, dtype)

    for file in ("checkpoint.lazy_model", "compress.stream", "compress.target_bits"):
        monkeypatch.setattr(f"tersor.{file}.compute_dtype", as_on_a_gpu)
    return tmp_path / "model"


def quantize(model: Path, out: Path, news: list[str], *, rare: bool, **options: Any) -> Compressed:
    """rare: the token that overflows is in a late sample, so that the check of the model does not meet it."""
    batches = samples("llama", 3)
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 50] = 51
    batches[2 if rare else 0]["input_ids"][0, 5] = 50

    def progress(what: str, done: int, total: int) -> None:
        if total == 0:
            news.append(what)

    return tersor.compress(
        model, GPTQ(group_size=32), calibration=batches, out=out, progress=progress, overwrite=False, **options
    )


def test_an_overflow_names_the_sample_or_the_held_out_text(overflowing: Path, tmp_path: Path) -> None:
    for rare, where in ((False, "calibration sample 0"), (True, "calibration sample 2")):
        with pytest.raises(TersorError, match=f"is not finite .* in {where}"):
            quantize(overflowing, tmp_path / "out", [], rare=rare, dtype=torch.float16)

    def letters(text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[50 + ord(letter) % 2 for letter in text]])}

    with pytest.raises(TersorError, match=r"not finite .* in the text that the result is compared on"):
        tersor.compress(overflowing, GPTQ(group_size=32), tokenizer=letters, samples=2, seq_len=64, dtype="float16")


@pytest.mark.parametrize("rare", [False, True], ids=["seen at once", "seen in a late sample"])
def test_a_model_that_overflows_float16_is_run_in_float32(overflowing: Path, tmp_path: Path, rare: bool) -> None:
    news: list[str] = []
    result = quantize(overflowing, tmp_path / "out", news, rare=rare)
    assert news.count("float16 overflows: running in float32") == 1
    assert all(torch.isfinite(torch.tensor(layer.error)) for layer in result.summary.layers)
    asked = quantize(overflowing, tmp_path / "asked", [], rare=rare, dtype="float32")
    one, other = ((out / "model.safetensors").read_bytes() for out in (result.directory, asked.directory))  # type: ignore[operator]
    assert one == other


def test_bits_are_measured_in_float32_where_float16_overflows(overflowing: Path, tmp_path: Path) -> None:
    news: list[str] = []
    result = quantize(overflowing, tmp_path / "out", news, rare=False, target_bits=4.5)
    assert news.count("float16 overflows: measuring in float32") == 1
    assert 3.0 < result.summary.bits_per_weight <= 4.5


def test_samples_of_an_iterator_are_there_for_the_run_in_float32(overflowing: Path, tmp_path: Path) -> None:
    batches = samples("llama", 2)
    batches[0]["input_ids"][0, 5] = 50
    result = tersor.compress(overflowing, GPTQ(group_size=32), calibration=iter(batches), out=tmp_path / "out")
    assert {layer.tokens for layer in result.summary.layers} == {48}  # type: ignore[attr-defined]


def test_an_interrupted_job_goes_on_in_the_precision_that_it_had_to_take(overflowing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def place(*_: object) -> None:
            raise Killed

        patch.setattr(ResultWriter, "place", place)
        with pytest.raises(Killed):
            quantize(overflowing, out, [], rare=True)
    result = quantize(overflowing, out, [], rare=True)
    assert result.summary.resumed_blocks == 2


def test_a_precision_that_was_asked_for_is_kept(overflowing: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="is not finite"):
        quantize(overflowing, tmp_path / "out", [], rare=True, dtype="float16")


def test_activations_are_checked_at_every_block(small: Path) -> None:
    """Weights that are finite and outputs that are not, in the last block."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)

    change_tensors(small, spoil)
    change_json(small / "config.json", dtype="float32")
    with pytest.raises(NotFiniteError, match=r"the output of model\.layers\.1 is not finite"):
        tersor.compress(small, GPTQ(group_size=32), samples=2, seq_len=32)
