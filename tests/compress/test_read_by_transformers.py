"""Each kind of model in compressed-tensors is loaded by transformers itself, and gives there what it gives here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo.tiny_models import LLAMA, MODELS, VIT, Tiny, build, samples

import tersor
from tersor import GPTQ, TersorError
from tersor.calibrate.batches import first_tensor

GPTQ32 = GPTQ(group_size=32)
SLIDING = {**LLAMA, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96}
MORE = {
    # experts in one stack, published under another name than the module's
    "granitemoe": Tiny(
        "GraniteMoeForCausalLM",
        {**LLAMA, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # experts in one stack, beside attention and a router that is called router.proj
    "gemma4_text": Tiny(
        "Gemma4ForCausalLM",
        {**SLIDING, **EXPERTS, **PER_LAYER, "enable_moe_block": True, "global_head_dim": 16, "num_kv_shared_layers": 0},
    ),
    # modules that are published under older names, and a tower that stays as it is
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        {"image_token_id": 90, "mm_tokens_per_image": 4},
        nested={
            "text_config": {"model_type": "gemma3_text", **SLIDING},
            "vision_config": {"model_type": "siglip_vision_model", **VIT},
        },
    ),
}
# how many experts a layer has that are packed
PACKED_EXPERTS = {"mixtral": 4, "gpt_oss": 0, "granitemoe": 0, "gemma4_text": 0, "gemma3": 0, "llava": 0}


@pytest.fixture(autouse=True, scope="module")
def known() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, tiny in MORE.items():
            patch.setitem(MODELS, name, tiny)
        yield


def saved(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder / "model")
    return folder / "model"


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = first_tensor(model(**batch))
    assert found is not None
    return found.float()


def by_transformers(name: str, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """From random numbers of another seed than the model's, should any tensor not be found."""
    torch.manual_seed(77)
    kind = getattr(transformers, MODELS[name].architecture)
    return output(kind.from_pretrained(folder, dtype=torch.float32).eval(), batch)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4_text", "llava")]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "gemma3", *SLOW])
def test_what_a_job_wrote(name: str, tmp_path: Path) -> None:
    batches, told = samples(name, 2), []
    result = tersor.compress(
        saved(name, tmp_path),
        GPTQ32,
        calibration=batches,
        format="compressed-tensors",
        out=tmp_path / "out",
        progress=lambda what, done, total: told.append(what),
    )
    packed = [layer.name for layer in result.summary.layers if ".experts." in layer.name]
    assert len(packed) == PACKED_EXPERTS[name] * 2 * 2  # two stacks in each of two layers
    assert len(result.summary.layers) > len(packed)
    stacks = name in ("gpt_oss", "granitemoe", "gemma4_text")
    assert any("16 experts stay as they are" in line for line in told) == stacks
    ours = output(result.model, batches[0])
    assert (ours - output(build(name), batches[0])).abs().max() > 1e-3
    torch.testing.assert_close(by_transformers(name, tmp_path / "out", batches[0]), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_what_was_compressed_in_memory(name: str, tmp_path: Path) -> None:
    batches = samples(name, 2)
    result = tersor.compress(build(name), GPTQ32, calibration=batches, format="compressed-tensors")
    assert not any(".experts." in layer.name for layer in result.summary.layers)
    result.save(tmp_path / "out")
    ours = output(result.model, batches[0])
    torch.testing.assert_close(by_transformers(name, tmp_path / "out", batches[0]), ours, rtol=1e-4, atol=1e-5)


def test_stacked_experts_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"experts\.gate_up_proj\.0 lies in one tensor .* use --format gptq"):
        tersor.compress(
            saved("gpt_oss", tmp_path),
            GPTQ32,
            calibration=samples("gpt_oss", 1),
            format="compressed-tensors",
            include=["*.experts.*"],
        )


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_stack_that_is_published_under_another_name_loads_again(tmp_path: Path, format: str) -> None:
    batches = samples("granitemoe", 2)
    model = saved("granitemoe", tmp_path)
    result = tersor.compress(model, GPTQ32, calibration=batches, format=format, out=tmp_path / "out")
    experts = [layer.name for layer in result.summary.layers if ".experts." in layer.name]
    assert len(experts) == (16 if format == "gptq" else 0)
    assert not any("router" in layer.name for layer in result.summary.layers)
    before, after = output(build("granitemoe"), batches[0]), output(tersor.load(tmp_path / "out"), batches[0])
    assert 0 < float((after - before).norm() / before.norm()) < 0.5


def test_a_router_of_another_name_is_kept_in_any_format(tmp_path: Path) -> None:
    """Its four outputs fill no word of the gptq formats."""
    result = tersor.compress(
        saved("gemma4_text", tmp_path), GPTQ32, calibration=samples("gemma4_text", 1), format="gptq"
    )
    assert not any("router" in layer.name for layer in result.summary.layers)
    assert sum(".experts." in layer.name for layer in result.summary.layers) == 16


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_layers_that_differ_are_named_as_on_disk_and_as_modules(tmp_path: Path, format: str) -> None:
    tersor.compress(
        saved("gemma3", tmp_path),
        GPTQ32,
        rules=[{"match": "*.layers.0.mlp.down_proj", "bits": 8}, {"match": "*.layers.1.mlp.up_proj", "skip": True}],
        calibration=samples("gemma3", 1),
        format=format,
        out=tmp_path / "out",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    on_disk, module = "language_model.model.layers", "model.language_model.layers"
    if format == "gptq":
        for stem in (on_disk, module):
            escaped = stem.replace(".", r"\.")
            assert config["dynamic"][rf"+:^{escaped}\.0\.mlp\.down_proj$"]["bits"] == 8
            assert config["dynamic"][rf"-:^{escaped}\.1\.mlp\.up_proj$"] == {}
    else:
        assert {f"{stem}.1.mlp.up_proj" for stem in (on_disk, module)} <= set(config["ignore"])
        assert config["config_groups"]["group_1"]["weights"]["num_bits"] == 8
        assert len(config["config_groups"]["group_1"]["targets"]) == 2
        batch = samples("gemma3", 1)[0]
        ours = output(tersor.load(tmp_path / "out"), batch)
        torch.testing.assert_close(by_transformers("gemma3", tmp_path / "out", batch), ours, rtol=1e-4, atol=1e-5)


def test_linear_layers_that_are_never_called_are_named_too(tmp_path: Path) -> None:
    """The pooling head's attention uses the weight of its output layer itself; for a reader this is a linear layer."""
    result = tersor.compress(build("siglip"), GPTQ32, calibration=samples("siglip", 1), format="compressed-tensors")
    ignored, taken = result.summary.quantization["ignore"], {layer.name for layer in result.summary.layers}
    linears = {name for name, each in build("siglip").named_modules() if isinstance(each, nn.Linear)}
    assert "vision_model.head.attention.out_proj" in linears - taken
    assert linears - taken <= set(ignored)
    assert not taken & set(ignored)
