"""W8A8: layers that round their inputs token by token, from the option to the file and to its readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import change_json
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.evaluate.inspection import inspect_checkpoint
from tersor.kernels.int8_matmul import Int8Weight
from tersor.layers.quantized_linear import QuantizedLinear, packed_layers

W8A8: dict[str, Any] = {"bits": 8, "group_size": -1, "a_bits": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(llama: Path) -> Path:
    out = llama.parent / "w8a8"
    tersor.compress(llama, GPTQ(**W8A8), calibration=samples("llama", 3), out=out)
    return out


def inputs_and_outputs(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer was given, before it rounds, and what it made of it."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}), prepend=True)
        layer.register_forward_hook(lambda _, args, output, name=name: made.update({name: output}))
    with torch.no_grad():
        model(input_ids=ids)
    return {name: (given[name], made[name]) for name in names}


def test_the_file_says_so_and_holds_8_bit_integers(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    said = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    assert group["input_activations"] == said
    assert group["weights"]["strategy"] == "channel"
    checkpoint = open_checkpoint(packed)
    name = "model.layers.0.mlp.down_proj"
    tensors = checkpoint.read([f"{name}.weight", f"{name}.weight_scale"])
    assert tensors[f"{name}.weight"].dtype == torch.int8
    assert tensors[f"{name}.weight_scale"].shape == (len(tensors[f"{name}.weight"]), 1)


def test_loaded_it_multiplies_integers_and_computes_what_a_dense_reader_does(packed: Path) -> None:
    model = tersor.load(packed)
    layers = packed_layers(model)
    assert layers
    assert all(isinstance(each.prepared, Int8Weight) for each in layers.values())
    lazy = LazyModel(open_checkpoint(packed), dtype=torch.float32)
    dense = lazy.load_all()
    ids = torch.arange(24)[None]
    for name, (x, y) in inputs_and_outputs(dense, list(layers), ids).items():
        with torch.no_grad():
            assert torch.allclose(layers[name](x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_transformers_computes_the_same(packed: Path) -> None:
    ours = tersor.load(packed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    layers = packed_layers(ours)
    seen = inputs_and_outputs(theirs, list(layers), torch.arange(24)[None])
    assert seen.keys() == layers.keys()
    for name, (x, y) in seen.items():
        with torch.no_grad():
            assert torch.allclose(layers[name](x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max())), name
            dense = nn.functional.linear(x, layers[name].weight)
        assert not torch.allclose(dense, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))  # theirs rounds too


def test_what_is_lost_counts_the_rounding_of_inputs(llama: Path, packed: Path, tmp_path: Path) -> None:
    ids = torch.arange(30)[None]
    made = tersor.compress(llama, RTN(**W8A8), calibration=samples("llama", 3), out=tmp_path / "both")
    alone = tersor.compress(llama, RTN(bits=8, group_size=-1), calibration=samples("llama", 3), out=tmp_path / "one")
    assert made.after is not None
    assert alone.after is not None
    assert made.before is not None
    errors = [float((each.after - each.before).abs().mean()) for each in (made, alone)]  # type: ignore[operator]
    assert errors[0] > 1.2 * errors[1]
    assert torch.isfinite(tersor.load(packed)(input_ids=ids).logits).all()


def test_a_module_in_memory_is_saved_and_loaded_the_same(tmp_path: Path) -> None:
    result = tersor.compress(build("llama"), RTN(**W8A8), calibration=samples("llama", 3))
    result.save(tmp_path / "out")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours, again = result.model(input_ids=ids).logits, tersor.load(tmp_path / "out")(input_ids=ids).logits
    layer = next(each for each in result.model.modules() if isinstance(each, QuantizedLinear))
    assert layer.a_bits == 8
    assert torch.allclose(ours, again, atol=0.05 * float(ours.abs().max()))


def test_the_dense_model_of_the_user_is_left_alone() -> None:
    model = build("llama")
    tersor.compress(model, RTN(**W8A8), calibration=samples("llama", 3))
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_an_interrupted_job_goes_on_to_the_same_bytes(llama: Path, packed: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("compressed") and done == 1:
            raise KeyboardInterrupt

    job = {"calibration": samples("llama", 3), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        tersor.compress(llama, GPTQ(**W8A8), progress=stop, **job)
    tersor.compress(llama, GPTQ(**W8A8), **job)
    one, other = open_checkpoint(packed), open_checkpoint(tmp_path / "out")
    keys = list(one.shard_of)
    assert all(torch.equal(a, b) for a, b in zip(one.read(keys).values(), other.read(keys).values(), strict=True))


def test_it_comes_after_smoothquant_and_before_scales(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = [{"method": "smoothquant"}, {"method": "gptq", **W8A8}]
    recipe.write_text(json.dumps({"steps": steps}))
    given = ("--samples", 4, "--seq-len", 32)
    ran = tersor_command("compress", "recipe", recipe, small, *given, "--out", tmp_path / "out")
    assert ran.status == 0, ran
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    )
    tuned = ("compress", "scales", tmp_path / "out", "--original", small, "--epochs", 1, *given)
    ran = tersor_command(*tuned, "--out", tmp_path / "tuned")
    assert ran.status == 0, ran
    assert {each.a_bits for each in packed_layers(tersor.load(tmp_path / "tuned")).values()} == {8}


def test_inspect_and_eval_tell_it(
    packed: Path, small: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    rounded = {layer[3] for block in inspect_checkpoint(packed).blocks for layer in zip(*_columns(block), strict=True)}
    assert rounded == {8}
    tersor.compress(small, RTN(**W8A8), out=tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("A text of some words. " * 40)
    ran = tersor_command("eval", tmp_path / "out", "--text", text, "--seq-len", 32)
    assert ran.status == 0, ran
    assert "perplexity" in ran.out
    assert "of the input" in tersor_command("inspect", tmp_path / "out").out


def _columns(block: Any) -> tuple[Any, ...]:
    return block.linears, block.shapes, block.bits, block.a_bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"a_bits": 4}, "a_bits=4 is not allowed: 8; left out, inputs are not rounded"),
        (
            {"a_bits": 8},
            "a_bits 8 goes with weights of 8 bits, symmetric, with one step a row, not with bits 4, group_size 128",
        ),
        ({"a_bits": 8, "bits": 8, "group_size": -1, "sym": False}, "asymmetric: --bits 8 --group-size -1 --sym"),
    ],
)
@pytest.mark.parametrize("method", [GPTQ, RTN])
def test_other_grids_are_refused_in_one_line(method: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError) as error:
        method(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_formats_layers_and_tables_that_round_no_inputs_are_refused(llama: Path, tmp_path: Path) -> None:
    job = {"calibration": samples("llama", 3), "out": tmp_path / "out"}
    with pytest.raises(TersorError, match="cannot be stored as gptq; it can as compressed-tensors"):
        tersor.compress(llama, RTN(**W8A8), format="gptq", **job)
    with pytest.raises(TersorError, match="a_bits 8 does not go with --embeddings"):
        tersor.compress(llama, RTN(**W8A8), embeddings=True, **job)
    convolutions = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(32, 8)))
    with pytest.raises(TersorError, match=r"0\.0 is a Conv2d, and only nn.Linear rounds its inputs: --exclude '0.0'"):
        tersor.compress(convolutions, RTN(**W8A8), calibration=[torch.randn(2, 3, 3, 3)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dynamic": False}, "inputs are rounded with dynamic False"),
        ({"num_bits": 4}, "inputs are rounded with num_bits 4"),
        ({"strategy": "tensor"}, "inputs are rounded with strategy 'tensor'"),
    ],
)
def test_files_that_round_inputs_in_another_way_are_refused(
    packed: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= change
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_json(tmp_path / "config.json", **config)
    with pytest.raises(TersorError, match=said):
        tersor.load(tmp_path)
