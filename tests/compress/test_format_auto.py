"""The format where nobody names one: gptq where it holds every layer, else compressed-tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_of
from torch import nn
from zoo.tiny_models import MODELS, build, samples

import tersor
from tersor import RTN, TersorError

METHOD = RTN(bits=4, group_size=16)


@functools.cache
def odd() -> nn.Module:
    """A LLaMA whose MLP fills no whole words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**MODELS["llama"].config, "intermediate_size": 80})).eval()


def compressed(model: Any, **options: Any) -> tuple[tersor.Compressed, list[str]]:
    """The result, and the lines that the job said to be kept of its format."""
    said: list[str] = []
    result = tersor.compress(
        model,
        METHOD,
        calibration=samples("llama", 1),
        progress=lambda what, done, total: said.append(what) if total == 0 else None,
        **options,
    )
    return result, [line for line in said if line.startswith("format ")]


def test_a_model_that_gptq_holds_is_stored_as_gptq_without_a_word() -> None:
    result, said = compressed(build("llama"))
    assert (result.summary.format, said) == ("gptq", [])


def test_a_model_that_gptq_does_not_hold_is_stored_as_compressed_tensors_and_says_why(tmp_path: Path) -> None:
    odd().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    result, said = compressed(tmp_path / "model", out=tmp_path / "auto")
    assert result.summary.format == "compressed-tensors"
    layer = "model.layers.0.mlp.gate_proj"
    assert said == [f"format compressed-tensors: {layer} has 80 outputs, which gptq does not hold"]
    _, said = compressed(tmp_path / "model", out=tmp_path / "named", format="compressed-tensors")
    assert said == []
    assert files_of(tmp_path / "auto") == files_of(tmp_path / "named")


def test_layers_that_are_left_out_do_not_decide() -> None:
    result, said = compressed(odd(), exclude=["*.mlp.*"])
    assert (result.summary.format, said) == ("gptq", [])


def test_a_packed_embedding_goes_where_other_readers_know_it() -> None:
    result, said = compressed(build("llama"), embeddings=True)
    assert result.summary.format == "compressed-tensors"
    assert said == ["format compressed-tensors: model.embed_tokens has an embedding's rows, which gptq does not hold"]


def test_a_format_that_was_named_is_not_replaced() -> None:
    with pytest.raises(
        TersorError, match="gate_proj has 80 outputs; format gptq stores whole words of 32: use --format"
    ):
        compressed(odd(), format="gptq")


def test_layers_that_compressed_tensors_does_not_hold_either_are_named_with_what_helps() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    narrow = GPT2LMHeadModel(GPT2Config(**{**MODELS["gpt2"].config, "n_inner": 80})).eval()
    with pytest.raises(TersorError, match=r"c_fc has 80 outputs; .* or --exclude 'transformer\.h\.0\.mlp\.c_fc'"):
        compressed(narrow)
    assert compressed(narrow, exclude=["*.mlp.*"])[0].summary.format == "gptq"
