"""`tersor inspect` tells what is on disk after each kind of method, and refuses what would not load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, change_tensors

import tersor
from tersor.evaluate.inspection import inspect_checkpoint
from tersor.methods.method import from_options

PARAMETERS = 4_028_170  # of demo-vit


@pytest.mark.parametrize("method", ["repquant", "bct"])
def test_layers_that_a_method_exchanged_are_layers(method: str, tmp_path: Path) -> None:
    images = [{"image": torch.randn(2, 3, 32, 32)}]
    tersor.compress("demo-vit", from_options(method, {}), calibration=images, out=tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert [each["name"] for each in found.methods] == [method]
    assert found.parameters == PARAMETERS
    assert found.format.startswith("packed by its method, the rest float")
    (blocks,) = found.blocks
    assert (blocks.count, blocks.shapes) == (9, [(576, 192), (192, 192), (768, 192), (192, 768)])
    bits = {"repquant": 4, "bct": 8}[method]
    assert all(bits < each < bits + 0.5 for each in blocks.bits)
    assert blocks.a_bits == [bits] * 4
    assert not any("blocks" in name for name in found.outside)


def test_a_result_says_which_method_made_it_and_how_it_is_stored(
    tersor_command: Callable[..., Ran], tmp_path: Path
) -> None:
    assert tersor_command("compress", "ats", "demo-vit", "--out", tmp_path / "out").status == 0
    found = inspect_checkpoint(tmp_path / "out")
    assert (found.architecture, found.format, found.parameters) == ("ATS", "float16", PARAMETERS)
    assert "made by ats: ats_blocks 3-" in tersor_command("inspect", tmp_path / "out").out


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_refused_from_the_headers_in_the_words_of_eval(
    name: str, tersor_command: Callable[..., Ran], small: Path
) -> None:
    change_tensors(small, lambda tensors: tensors.update({name: torch.zeros(3, 4)}))
    said = tersor_command("inspect", small)
    assert said.status == 2
    assert f"{name} is (3, 4); the model's is" in said.err
    assert tersor_command("eval", small, "--seq-len", 16, "--max-windows", 1).err == said.err
