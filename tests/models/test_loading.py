"""Checkpoints: every file kind is read, and what does not fit is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.registry import find

NAME, SMALL = "shvit", find("shvit").small


@pytest.fixture
def model() -> nn.Module:
    return tersor.models.create(NAME, **SMALL).eval()


@pytest.fixture
def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def assert_loads(path: Path, model: nn.Module) -> None:
    loaded, image = tersor.models.load(NAME, path, **SMALL), torch.randn(1, 3, 64, 64)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


def test_safetensors_file_and_folder_of_shards(tmp_path: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    assert_loads(tmp_path / "whole.safetensors", model)
    shards, keys = tmp_path / "shards", list(state)
    shards.mkdir()
    save_file({key: state[key] for key in keys[:50]}, shards / "model-1.safetensors")
    save_file({key: state[key] for key in keys[50:]}, shards / "model-2.safetensors")
    assert_loads(shards, model)


def test_training_checkpoint_with_arguments_and_wrapper_prefix(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor]
) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    checkpoint = {"model": wrapped, "optimizer": {"step": 3}, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)


class Surprise:
    pass


def test_a_pickle_with_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"model": Surprise()}, tmp_path / "model.pth")
    with pytest.raises(TersorError, match=r"model\.pth holds Python objects"):
        tersor.models.load(NAME, tmp_path / "model.pth", **SMALL)


def test_what_does_not_fit_is_named(state: dict[str, Tensor]) -> None:
    broken = {key: value for key, value in state.items() if not key.startswith("head.l")}
    broken["extra"] = torch.zeros(1)
    broken["head.bn.bias"] = torch.zeros(3)
    with pytest.raises(TersorError) as raised:
        tersor.models.load(NAME, broken, **SMALL)
    assert str(raised.value) == (
        "shvit cannot take this checkpoint: 2 missing (head.l.weight, head.l.bias); 1 left over (extra); "
        "1 of the wrong shape (head.bn.bias is [3], the model has [32])"
    )


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="there is no checkpoint"):
        tersor.models.load(NAME, tmp_path / "none.pth", **SMALL)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(TersorError, match="checkpoints end in"):
        tersor.models.load(NAME, tmp_path / "weights.gguf", **SMALL)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(TersorError, match="no tensors by name, but a dict with the keys 'epoch'"):
        tersor.models.load(NAME, tmp_path / "empty.pth", **SMALL)
