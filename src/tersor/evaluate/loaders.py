"""Which engines load a checkpoint, and which of them were tested: docs/formats.md and docs/gguf.md, for one directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tersor.checkpoint.gguf_architecture import ARCHITECTURES, metadata_of
from tersor.checkpoint.quantization_config import read_config
from tersor.checkpoint.skeleton import build_skeleton
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint, torch_dtype
from tersor.errors import TersorError
from tersor.formats.gguf_blocks import BLOCK
from tersor.formats.layout import QuantizationConfig
from tersor.layers.exchange import EXCHANGED

TESTED, UNTESTED, REFUSED = "tested", "not tested", "does not load"
IN_LLAMA_CPP = (  # (bits, symmetric, group) of a Llama whose logits were compared in llama.cpp
    *((4, True, group) for group in (32, 128, -1)),
    (4, False, 32),
    (3, True, 32),
    (2, False, 32),
    (8, True, 32),
)


@dataclass(frozen=True)
class Loader:
    """Whether an engine loads a checkpoint."""

    engine: str
    state: str  # TESTED, REFUSED or UNTESTED: it reads the format, and nobody here ran it
    how: str  # how it was tested, or why it is refused


def loaders_of(model: Openable) -> list[Loader]:
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
        return [*found, Loader("vLLM", UNTESTED, "a plain checkpoint"), _llama_cpp(checkpoint, quantization)]
    if quantization.layout == "compressed-tensors":
        found += _compressed(quantization)
    elif quantization.layout in ("gptq", "gptq_v2"):
        found += _gptq(quantization)
    return [*found, _llama_cpp(checkpoint, quantization)]


def _compressed(quantization: QuantizationConfig) -> list[Loader]:
    symmetric = quantization.sym and all(changes.get("sym", True) for _, changes in quantization.overrides)
    if not symmetric:
        why = "transformers 5.24 with compressed-tensors 0.20 expects zero points that are not packed"
        return [Loader("transformers", REFUSED, why), Loader("vLLM", UNTESTED, "pack-quantized, asymmetric")]
    if quantization.a_bits is not None:
        how = "with the compressed-tensors package; CI compares each layer's outputs on the same inputs"
        return [Loader("transformers", TESTED, how), Loader("vLLM", UNTESTED, "int-quantized is its layout of W8A8")]
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


def _llama_cpp(checkpoint: Checkpoint, quantization: QuantizationConfig | None) -> Loader:
    """What `tersor export` would say of it, from the config alone. TESTED: a row of benchmarks/results/gguf_in_llamacpp.md."""
    if checkpoint.gguf is not None:
        return Loader("llama.cpp", UNTESTED, "it is a GGUF file; nobody here ran this one")
    why = _why_no_gguf(checkpoint, quantization)
    if why is not None:
        return Loader("llama.cpp", REFUSED, f"`tersor export` refuses it: {why}")
    if quantization is None:
        if torch_dtype(checkpoint.config) == torch.float16:
            return Loader("llama.cpp", UNTESTED, "after `tersor export`; logits were compared in float32 and bfloat16")
        how = "after `tersor export`; benchmarks/results/gguf_in_llamacpp.md compares logits of its architecture"
        return Loader("llama.cpp", TESTED, how)
    if quantization.desc_act and quantization.group_size != -1:
        return Loader("llama.cpp", UNTESTED, "with groups in the order of columns only: docs/gguf.md")
    if quantization.layout == "compressed-tensors" and torch_dtype(checkpoint.config) != torch.float16:
        return Loader("llama.cpp", UNTESTED, "after `tersor export`, where its steps are float16 numbers: docs/gguf.md")
    grid = (quantization.bits, quantization.sym, quantization.group_size)
    llama = checkpoint.config["architectures"][0] == "LlamaForCausalLM"
    if not llama or grid not in IN_LLAMA_CPP or quantization.overrides:
        how = "after `tersor export`; nobody compared logits of this architecture on this grid"
        return Loader("llama.cpp", UNTESTED, how)
    return Loader("llama.cpp", TESTED, "after `tersor export`; benchmarks/results/gguf_in_llamacpp.md compares logits")


def _why_no_gguf(checkpoint: Checkpoint, quantization: QuantizationConfig | None) -> str | None:
    name = str((checkpoint.config.get("architectures") or [""])[0])
    if name not in ARCHITECTURES:
        return f"it writes {', '.join(ARCHITECTURES)}, and this is {name}"
    try:
        module: Any = build_skeleton(checkpoint, torch_dtype(checkpoint.config))
        metadata_of(module.config, ARCHITECTURES[name])
    except TersorError as error:
        return str(error)
    if quantization is None:
        return None
    for each in (quantization, *(replace(quantization, **changes) for _, changes in quantization.overrides)):
        if each.group_size != -1 and each.group_size % BLOCK:
            return f"groups of {each.group_size} are no multiple of {BLOCK}"
        if each.bits == 8 and not each.sym:
            return "8 bits, asymmetric, leave -128 to 127"
    return None
