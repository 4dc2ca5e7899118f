"""Whole checkpoints that GPTQModel and llm-compressor wrote: loaded, written again, and matched by tersor's own GPTQ."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor import GPTQ
from tersor.checkpoint.quantization_config import read_config
from tersor.formats.layouts import layout_named, write
from tersor.layers.quantized_linear import QuantizedLinear

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("gptq-checkpoint-*/*/case.json"))

each_checkpoint = pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)


@each_checkpoint
def test_loads_with_the_stored_logits(folder: Path) -> None:
    stored = np.load(folder / "logits.npz")
    logits = _logits(tersor.load(folder), stored["input_ids"])
    assert _relative_error(logits, stored["logits_exact"]) < 1e-4


@each_checkpoint
def test_is_written_again_bit_for_bit(folder: Path) -> None:
    model, on_disk = tersor.load(folder), load_file(folder / "model.safetensors")
    config = read_config(folder, json.loads((folder / "config.json").read_text()))
    assert config is not None
    written: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors = write(module.packed, layout_named(config.layout), sym=config.sym)
            written |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    assert len(written) > 0
    for name, tensor in written.items():
        assert tensor.dtype == on_disk[name].dtype, name
        assert torch.equal(tensor, on_disk[name]), name
    rest = {name: tensor for name, tensor in on_disk.items() if name not in written}
    state = model.state_dict()
    for name, tensor in rest.items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name


@each_checkpoint
def test_our_gptq_loses_no_more_than_the_tool_that_wrote_it(folder: Path) -> None:
    case, stored = json.loads((folder / "case.json").read_text()), np.load(folder / "logits.npz")
    config = read_config(folder, json.loads((folder / "config.json").read_text()))
    assert config is not None
    model = _source_model()
    assert _relative_error(_logits(model, stored["input_ids"]), stored["logits_source"]) < 1e-4

    # Both tools order the columns without scattering the groups, unless the checkpoint says that they are scattered.
    method = GPTQ(
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=True,
        static_groups=not config.desc_act,
    )
    result = tersor.compress(model, method, calibration=_calibration(), format=config.layout)
    error = _relative_error(_logits(result.model, stored["input_ids"]), stored["logits_source"])
    assert error <= case["rel_error_exact"]
    assert error < 0.95 * case["rel_error_rtn"]


@cache
def _source_model() -> nn.Module:
    """The tiny Llama that both tools quantized; its weights follow from their names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        values = values * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1 + 0.1 * values
        parameter.data = torch.from_numpy(values.astype(np.float32)).bfloat16().float()
    return model


def _calibration() -> list[dict[str, Any]]:
    random = np.random.RandomState(7)
    return [{"input_ids": torch.from_numpy(random.randint(3, 256, 64))[None]} for _ in range(32)]


@torch.no_grad()
def _logits(model: nn.Module, input_ids: np.ndarray) -> Tensor:
    logits: Tensor = model(input_ids=torch.from_numpy(input_ids).long()).logits
    return logits


def _relative_error(got: Tensor, expected: np.ndarray) -> float:
    want = torch.from_numpy(expected)
    return float((got - want).norm() / want.norm())
