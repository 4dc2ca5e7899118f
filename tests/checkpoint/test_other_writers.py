"""Configs as other tools write them: where tersor reads one, it reads what the tool's own reader reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tersor
from tersor import RTN
from tersor.checkpoint.quantization_config import parse_config

IDS = torch.arange(4, 30)[None]
NUMBERS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**NUMBERS, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 4 bits, its down projections of 8, written as compressed-tensors."""
    folder = tmp_path_factory.mktemp("mixed")
    small_llama().save_pretrained(folder / "model")
    rules = [{"match": "*.down_proj", "bits": 8}]
    tersor.compress(
        folder / "model", RTN(bits=4, group_size=32), rules=rules, format="compressed-tensors", out=folder / "q"
    )
    return folder / "q"


def regrouped(folder: Path, target: Path, eight: list[str], four: list[str], *, eight_first: bool) -> Path:
    """The checkpoint with its two groups under other targets, in this order."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    wide, narrow = {**groups["group_1"], "targets": eight}, {**groups["group_0"], "targets": four}
    ordered = [wide, narrow] if eight_first else [narrow, wide]
    config["quantization_config"]["config_groups"] = {f"group_{n}": each for n, each in enumerate(ordered)}
    (target / "config.json").write_text(json.dumps(config))
    return target


NAMES = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]


@pytest.mark.parametrize("eight_first", [True, False])
@pytest.mark.parametrize(
    ("eight", "four"),
    [
        (["re:.*down_proj$"], ["Linear"]),
        (NAMES, ["Linear"]),
        (NAMES, ["re:.*proj$"]),
        (["re:.*down_proj$"], ["re:.*proj$"]),  # the first in the alphabet wins
    ],
)
def test_groups_of_compressed_tensors_are_read_as_transformers_reads_them(
    mixed: Path, tmp_path: Path, eight: list[str], four: list[str], eight_first: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = regrouped(mixed, tmp_path / "q", eight, four, eight_first=eight_first)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits
        torch.testing.assert_close(tersor.load(folder)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_most_specific_target_wins() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "format": "pack-quantized", "weights": {"num_bits": bits, "group_size": 32}}

    config = parse_config(
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": group(2, "Linear"),
                "b": group(8, "re:.*b$"),
                "c": group(3, "x.b"),
                "d": group(4, "Own"),
            },
        }
    )
    assert config.bits == 2
    assert config.for_layer("x.b").bits == 3
    assert config.for_layer("y.b").bits == 8
    assert (
        config.for_layer("y.c", classes=("Own", "Linear", "Module")).bits == 2
    )  # classes in the order of the alphabet
    assert config.for_layer("y.c", classes=("Own", "Module")).bits == 4
    assert config.for_layer("model.y.c", "y.b").bits == 8  # by either of its names


def words(values: Tensor) -> Tensor:
    """Eight nibbles a word, in AWQ's order."""
    parts = values.view(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].long()
    packed = (parts << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A checkpoint with AWQ's tensors and no quantization config yet, and its logits."""
    folder, model = tmp_path_factory.mktemp("awq"), small_llama()
    model.save_pretrained(folder)
    stored, dense = {}, model.state_dict()
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            stored[name] = weight.clone()
            continue
        outputs, inputs = weight.shape
        codes, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(0, 16, (inputs // 32, outputs))
        scales, stem = torch.rand(inputs // 32, outputs).half() * 0.02, name.removesuffix(".weight")
        dense[name] = ((codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).t()
        stored |= {f"{stem}.qweight": words(codes), f"{stem}.qzeros": words(zeros), f"{stem}.scales": scales}
    model.load_state_dict(dense)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        return folder, model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("config.json", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
        ("config.json", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("config.json", {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_awq_is_read_in_either_spelling_of_its_config(
    awq: tuple[Path, Tensor], tmp_path: Path, file: str, config: dict[str, Any]
) -> None:
    folder = shutil.copytree(awq[0], tmp_path / "m")
    plain = json.loads((folder / "config.json").read_text())
    written = {**plain, "quantization_config": config} if file == "config.json" else config
    (folder / file).write_text(json.dumps(written))
    with torch.no_grad():
        torch.testing.assert_close(tersor.load(folder)(input_ids=IDS).logits, awq[1], rtol=1e-4, atol=1e-5)
