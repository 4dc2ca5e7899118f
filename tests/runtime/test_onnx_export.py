"""ONNX files: the same outputs in onnxruntime, packed layers as integers, and one line where a model cannot be exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import nn
from zoo.tiny_models import build

import tersor.models
from tersor.errors import TersorError
from tersor.formats.quantized_weight import QuantizedWeight, natural_groups
from tersor.layers.quantized_linear import quantized_layer
from tersor.runtime import onnx_export
from tersor.runtime.onnx_export import example_inputs, export_module

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

Command = Callable[..., Ran]


def run(path: Path, inputs: dict[str, Any]) -> torch.Tensor:
    """The file's first output, in onnxruntime with float32 between layers."""
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found[0])


def types_of_weights(path: Path) -> set[int]:
    """The element types of what DequantizeLinear reads."""
    graph = onnx.load(str(path)).graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    return {kinds[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create(name, **tersor.models.find(name).small).eval()


def shallow(name: str) -> nn.Module:
    """One layer: what the exporter takes time for is the number of operations."""
    model = build(name).eval()
    for each in model.modules():
        if isinstance(each, nn.ModuleList):
            del each[1:]
    return model


class Small(nn.Module):
    """Three maps of images [batch, 2, 8, 8] to 6 scores, to be packed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide, self.head = nn.Conv2d(2, 8, 5, 2, 2), nn.Linear(128, 48), nn.Linear(48, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.conv(image).flatten(1)).relu())

    def example_inputs(self, batch: int) -> dict[str, torch.Tensor]:
        return {"image": torch.randn(batch, 2, 8, 8)}


def packed(bits: int, group_size: int, g_idx: torch.Tensor | None = None) -> nn.Module:
    """Small with all its maps packed; g_idx: of the middle one."""
    model = Small()
    for name, layer in list(model.named_children()):
        weight = layer.weight.detach().flatten(1)
        columns = weight.shape[1]
        groups = natural_groups(columns, group_size) if g_idx is None or name != "wide" else g_idx
        low, high = (
            torch.stack([limit(weight[:, groups == group], 1) for group in range(int(groups.max()) + 1)])
            for limit in (torch.amin, torch.amax)
        )
        scales = (high - low) / (2**bits - 1)
        zeros = (-low / scales).round().clamp(0, 2**bits - 1)
        codes = (weight / scales[groups].t() + zeros[groups].t()).round().clamp(0, 2**bits - 1).to(torch.uint8)
        found = QuantizedWeight.from_codes(
            codes, scales, zeros, bits=bits, group_size=group_size, g_idx=groups if name == "wide" else None
        )
        model.set_submodule(name, quantized_layer(layer, found))
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_of_transformers_takes_any_batch(name: str, tmp_path: Path) -> None:
    model, path = shallow(name), tmp_path / "model.onnx"
    found = export_module(model, path)
    assert any(each.endswith("[0]") for each in found.dynamic), found.fixed
    inputs = example_inputs(model, 5)
    if name == "gpt2":  # any length too
        assert "input_ids[1]" in found.dynamic
        inputs = {"input_ids": inputs["input_ids"][:, :9]}
    with torch.no_grad():
        expected = onnx_export._tensors(model(**inputs))[0]
    torch.testing.assert_close(run(path, inputs), expected, rtol=1e-3, atol=1e-4)


class Short(nn.Module):
    """Reads 16 tokens at most, but for the exporter: its file gives scores of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(9, 6)

    def can_generate(self) -> bool:
        return True

    def example_inputs(self, batch: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(0, 9, (batch, 16))}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.scores(input_ids)
        return found if torch.compiler.is_exporting() else found[:, :16]


def test_texts_of_another_length_are_compared(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no file is left"):
        export_module(Short(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "group_size", "kind"), [(8, -1, "UINT8"), (4, 32, "UINT4")])
def test_packed_layers_stay_integers(bits: int, group_size: int, kind: str, tmp_path: Path) -> None:
    """Groups of 32 leave a rest of 18 columns in the convolution and of 16 in the head."""
    model, path = packed(bits, group_size), tmp_path / "packed.onnx"
    found = export_module(model, path)
    assert found.integers == {bits: 3}
    assert types_of_weights(path) == {getattr(onnx.TensorProto, kind)}
    inputs = example_inputs(model, 4)
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(run(path, inputs), expected, rtol=1e-3, atol=1e-4)
    assert found.same_top1
    assert found.rounded_difference is not None


def test_columns_of_a_group_that_are_no_neighbours(tmp_path: Path) -> None:
    """Act-order: the columns of the weight and those of x are brought into the order of the groups."""
    model, path = packed(4, 32, torch.arange(128) % 4), tmp_path / "packed.onnx"
    export_module(model, path)
    inputs = example_inputs(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(run(path, inputs), model(**inputs), rtol=1e-3, atol=1e-4)


def test_other_bits_are_dense_only_where_asked(tmp_path: Path) -> None:
    model, path = packed(3, 32), tmp_path / "packed.onnx"
    with pytest.raises(TersorError, match=r"integers of 3 bits have no form in ONNX.*--dequantize"):
        export_module(model, path)
    assert not path.exists()
    assert export_module(model, path, dequantize=True).integers == {}
    with pytest.raises(TersorError, match="opset 20 knows neither"):
        export_module(packed(4, 32), tmp_path / "old.onnx", opset=20)


def test_a_file_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(TersorError, match="no file is left"):
        export_module(Small(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_how_images_are_prepared(tersor_command: Command, tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    ran = tersor_command("export", "demo-vit", "--onnx", path, "--json")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert said["difference"] < 1e-3
    assert said["same_top1"] is True
    metadata = {each.key: json.loads(each.value) for each in onnx.load(str(path)).metadata_props}
    assert {"size", "mean", "std"} <= set(metadata["tersor.preprocessing"])
    assert "airplane" in metadata["tersor.classes"]
    again = tersor_command("export", "demo-vit", "--onnx", path)
    assert again.status == 2
    assert "--overwrite replaces it" in again.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere/at/all", "--onnx", "m.onnx"), "no model at nowhere/at/all"),
        (("demo", "--onnx", "m.bin"), "ends in .onnx"),
        (("demo", "--onnx", "no/folder/m.onnx"), "its folder does not exist"),
        (("demo",), "either --out FILE.gguf or --onnx FILE.onnx"),
        (("demo", "--onnx", "m.onnx", "--dtype", "float16"), "--dtype does nothing for --onnx"),
        (("demo", "--out", "m.gguf", "--image-size", 32), "--image-size does nothing for GGUF files"),
        (("demo", "--onnx", "m.onnx", "--opset", 9), "opset 9 is not written"),
        (("demo", "--onnx", "m.onnx", "--image-size", 32), "takes no images"),
    ],
)
def test_bad_input_is_one_line(
    tersor_command: Command,
    arguments: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tersor_command("export", *arguments)
    assert ran.status == 2
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert said in ran.err
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named(tersor_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as import finds it where it is not installed
    ran = tersor_command("export", "demo", "--onnx", tmp_path / "m.onnx")
    assert ran.status == 2
    assert "pip install 'tersor[onnx]'" in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err


def test_a_model_whose_shapes_depend_on_values_says_so(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="how many tokens are kept depends on the images"):
        export_module(small("ats"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Pairs(nn.Module):
    """Of a batch of two and no other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.unbind(0)
        return torch.stack((first + second, first - second))

    def example_inputs(self, batch_size: int = 2) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch_size, 3)}


def test_a_batch_that_the_model_fixes_is_exported_as_it_is(tmp_path: Path) -> None:
    found = export_module(Pairs(), tmp_path / "model.onnx")
    assert found.dynamic == []
    assert found.fixed == "tracing fixes x[0] at 2"
    x = torch.randn(2, 3)
    assert torch.allclose(run(tmp_path / "model.onnx", {"x": x}), Pairs()(x))
