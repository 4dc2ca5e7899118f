"""What a job says of its memory before it starts, where activations wait, which checkpoints are opened, and how layers split."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, files_of
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, TersorError


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_activations_wait_changes_nothing_of_the_result(
    small_source: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.calibrate.activations.SMALLEST", 1)
    for out, activations in (("device", "device"), (place, place)):
        tersor.compress(
            small_source, GPTQ(group_size=32), samples=3, seq_len=32, out=tmp_path / out, activations=activations
        )
    assert files_of(tmp_path / place) == files_of(tmp_path / "device")


def test_the_forecast_is_printed_before_anything_is_solved(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path
) -> None:
    command = ("quantize", small_source, "--out", tmp_path / "out", "--group-size", 32, "--samples", 2, "--seq-len", 32)
    ran = tersor_command(*command)
    assert ran.status == 0
    line, few = ran.err.splitlines()
    assert few.startswith("64 calibration tokens are few")
    found = re.fullmatch(r"forecast: \d+ (s|min), ([\d.]+) GB of memory, ([\d.]+) GB of disk", line)
    assert found
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert held / 2 < float(found[2]) < 2 * held
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert float(found[3]) == pytest.approx(2 * written / 1e9, abs=0.006)  # blocks, and the file made of them


# ---- pickled checkpoints


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    model = build("llama")
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_with_the_reason(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TersorError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code.*--allow-pickle"
    ):
        tersor.compress(pickled, GPTQ(group_size=32), calibration=samples("llama", 2), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_read_like_safetensors_where_allowed(pickled: Path, tmp_path: Path, name: str) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / name)
    build("llama").save_pretrained(tmp_path / "safe")  # type: ignore[operator]
    for model, out in ((pickled, "one"), (tmp_path / "safe", "other")):
        tersor.compress(
            model, GPTQ(group_size=32), calibration=samples("llama", 2), out=tmp_path / out, allow_pickle=True
        )
    one, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "other"))
    assert one == other
    assert not (tmp_path / "one" / name).exists()


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_pickle_does_not_run(pickled: Path, tmp_path: Path) -> None:
    torch.save({"weight": Payload(f"touch {tmp_path}/ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(TersorError, match=r"pytorch_model\.bin cannot be read as weights only"):
        tersor.compress(pickled, GPTQ(group_size=32), calibration=samples("llama", 2), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


# ---- serving on several devices


@pytest.mark.parametrize(
    ("layers", "devices", "group_size", "said"),
    [
        ("q_proj", 3, 32, r"its 64 outputs do not split over 3 devices in whole words of 32; --target-tp 2 would work"),
        ("o_proj", 2, 64, r"its 64 inputs do not split over 2 devices in whole groups of 64; .* or --target-tp 1"),
        ("down_proj", 3, 64, r"its 128 inputs do not split over 3 devices in whole groups of 64; .* or --target-tp 2"),
        ("o_proj", 0, 32, "target_tp=0 must be positive"),
    ],
)
def test_a_layout_that_does_not_split_is_refused_with_what_would(
    layers: str, devices: int, group_size: int, said: str
) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.compress(
            build("llama"),
            GPTQ(group_size=group_size),
            calibration=samples("llama", 1),
            target_tp=devices,
            include=[f"*.{layers}"],
        )


def test_a_layout_that_splits_is_taken() -> None:
    exclude = ["*.k_proj", "*.v_proj"]  # 32 outputs each
    tersor.compress(build("llama"), GPTQ(group_size=32), calibration=samples("llama", 1), target_tp=2, exclude=exclude)
