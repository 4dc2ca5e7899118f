"""Which engines load a checkpoint, and which were seen to: what docs/formats.md and docs/gguf.md say, for one directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.checkpoint.quantization_config import read_config
from tersor.checkpoint.source import open_checkpoint
from tersor.formats.layout import QuantizationConfig
from tersor.layers.exchange import EXCHANGED

TESTED, UNTESTED, REFUSED = "tested", "not tested", "does not load"


@dataclass(frozen=True)
class Loader:
    """state: TESTED, UNTESTED (it reads the format; nobody here ran it) or REFUSED; how: what was tested, or why not."""

    engine: str
    state: str
    how: str


def loaders_of(model: str | Path) -> list[Loader]:
    """Raises TersorError where it is no model."""
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    found = [Loader("tersor", TESTED, "every job reads back what it wrote and compares the outputs")]
    if config.get(EXCHANGED) or "tersor_model" in config or "architectures" not in config:
        what = "layers of another structure" if config.get(EXCHANGED) else "an architecture of tersor's own"
        return [*found, Loader("transformers, vLLM, llama.cpp", REFUSED, f"the model has {what}")]
    quantization = read_config(checkpoint.directory, config)
    if quantization is None:
        found.append(Loader("transformers", TESTED, "a plain checkpoint in its own layout"))
        return [*found, Loader("vLLM", UNTESTED, "a plain checkpoint"), _llama_cpp(config, quantization)]
    if quantization.layout == "compressed-tensors":
        found += _compressed(quantization)
    elif quantization.layout in ("gptq", "gptq_v2"):
        found += _gptq(quantization)
    return [*found, _llama_cpp(config, quantization)]


def _compressed(quantization: QuantizationConfig) -> list[Loader]:
    symmetric = quantization.sym and all(changes.get("sym", True) for _, changes in quantization.overrides)
    if not symmetric:
        why = "transformers 5.24 with compressed-tensors 0.20 expects zero points that are not packed"
        return [Loader("transformers", REFUSED, why), Loader("vLLM", UNTESTED, "pack-quantized, asymmetric")]
    how = "with the compressed-tensors package; CI compares the logits of symmetric checkpoints"
    return [Loader("transformers", TESTED, how), Loader("vLLM", UNTESTED, "pack-quantized is its own layout")]


def _gptq(quantization: QuantizationConfig) -> list[Loader]:
    seen = quantization.layout == "gptq" and quantization.bits == 4 and quantization.sym and not quantization.overrides
    how = (
        "a 4-bit symmetric checkpoint, logits compared: benchmarks/results/loads_elsewhere.md"
        if seen
        else f"{quantization.bits} bits, {'symmetric' if quantization.sym else 'asymmetric'}, {quantization.layout}: "
        "only 4 bits, symmetric, in format gptq was run"
    )
    return [
        Loader("GPTQModel", TESTED if seen else UNTESTED, how),
        Loader("transformers", UNTESTED, "through GPTQModel"),
        Loader("vLLM", UNTESTED, f"its kernels for GPTQ at {quantization.bits} bits decide"),
    ]


def _llama_cpp(config: Mapping[str, Any], quantization: QuantizationConfig | None) -> Loader:
    scattered = quantization is not None and quantization.desc_act
    family = any(name in str((config.get("architectures") or [""])[0]) for name in ("Llama", "Mistral", "Qwen"))
    if not family:
        return Loader("llama.cpp", REFUSED, "`tersor export` writes models of the LLaMA family")
    if scattered and quantization is not None and quantization.group_size != -1:
        return Loader("llama.cpp", UNTESTED, "with groups in the order of columns only: docs/gguf.md")
    return Loader("llama.cpp", TESTED, "after `tersor export`; benchmarks/results/gguf_in_llamacpp.md compares logits")
