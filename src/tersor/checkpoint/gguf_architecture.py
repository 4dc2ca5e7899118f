"""The names that a GGUF file has for the tensors and numbers of a LLaMA-like model, to and from transformers' names.

Transformers rotates the two halves of a head. llama.cpp's `llama` architecture rotates neighbouring pairs, so it stores the
rows of the query and key projections in another order (`rows_in_file`); `qwen2` and `qwen3` rotate halves too. Of the ways to
scale rotary frequencies, `linear` and `yarn` are metadata, and `llama3` is a tensor of divisors, `rope_freqs.weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError

FREQUENCIES = "rope_freqs.weight"
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FROM_INSIDE = {short: name for name, short in INSIDE.items()}
_FROM_OUTSIDE = {short: name for name, short in OUTSIDE.items()}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp, and the class of transformers that it stands for."""

    name: str  # in the file
    model_type: str  # in config.json
    permuted: bool  # whether rows of q and k are in llama.cpp's own order
    biased: tuple[str, ...]  # layers that may have a bias


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "llama", True, _ALL),
    "MistralForCausalLM": Architecture("llama", "mistral", True, ()),
    "Qwen2ForCausalLM": Architecture("qwen2", "qwen2", False, ("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": Architecture("qwen3", "qwen3", False, ()),
}


def architecture_of(name: str) -> Architecture:
    """The architecture of a transformers class. Raises TersorError where no GGUF file of it can be written."""
    if name not in ARCHITECTURES:
        raise TersorError(f"{name} cannot be written as GGUF; tersor knows how for {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def name_in_file(name: str, architecture: Architecture) -> str:
    """The file's name of a tensor or layer of the module tree, such as `model.layers.3.mlp.up_proj.weight`."""
    stem, _, leaf = name.rpartition(".")
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    short = INSIDE.get(inside[2]) if inside else OUTSIDE.get(stem)
    if short is None or (leaf == "bias" and stem.rpartition(".")[2] not in architecture.biased):
        raise TersorError(f"{name} has no place in a GGUF file of the architecture {architecture.name}")
    return f"blk.{inside[1]}.{short}.{leaf}" if inside else f"{short}.{leaf}"


def name_from_file(name: str) -> str | None:
    """Inverse of `name_in_file`; None for a name that is not of this family."""
    stem, _, leaf = name.rpartition(".")
    inside = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    long = _FROM_INSIDE.get(inside[2]) if inside else _FROM_OUTSIDE.get(stem)
    if long is None:
        return None
    return f"model.layers.{inside[1]}.{long}.{leaf}" if inside else f"{long}.{leaf}"


def heads_permuted(name: str, heads: int, key_heads: int) -> int | None:
    """The number of heads of a tensor whose rows `llama` stores in another order (q and k); else None. name: transformers'."""
    return {"q_proj": heads, "k_proj": key_heads}.get(name.rpartition(".")[0].rpartition(".")[2])


def rows_in_file(rows: int, heads: int) -> Tensor:
    """For each row of the file, the row of transformers' q or k: element i of a head's first half, then element i of its second
    half, for every i. int64 [rows]; its argsort is the inverse."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def metadata_of(config: Any, architecture: Architecture) -> dict[str, Any]:
    """A transformers config under the file's keys, without the tokenizer's. Raises TersorError for what llama.cpp would compute
    differently."""
    if config.hidden_act != "silu":
        raise TersorError(
            f"the activation {config.hidden_act!r} has no GGUF model of {architecture.name}; only silu has"
        )
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and architecture.model_type == "mistral":
        context = min(context, window)  # llama.cpp attends to all tokens, which is the same within the window
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise TersorError(f"layers with a sliding window of {window} have no GGUF model of {architecture.name}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        **_rope_metadata(dict(config.rope_parameters)),
    }
    return {f"{architecture.name}.{key}": value for key, value in numbers.items()}


def _rope_metadata(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": _LLAMA3,
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    if kind not in known:
        raise TersorError(f"rotary positions of type {kind!r} have no GGUF model here; {', '.join(known)} have")
    # both programs have these defaults for yarn; other values are refused
    standard = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1.0, "truncate": True}
    for key, value in rope.items():
        understood = key in ("rope_type", "type", "rope_theta", *known[kind]) or value in (None, standard.get(key))
        if not understood:
            raise TersorError(f"rotary positions with {key}={value!r} have no GGUF model here")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        if rope.get("original_max_position_embeddings") is None:
            raise TersorError(
                "rotary positions of type 'yarn' without original_max_position_embeddings have no GGUF model here"
            )
        found["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return found


_LOW, _HIGH = 1.0, 4.0  # low_freq_factor and high_freq_factor of all published models
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def frequency_divisors(config: Any) -> Tensor | None:
    """llama3 scaling as the file has it: the divisor of each rotary frequency, float32 [head_dim / 2]. None for other scalings.

    Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor stay, and
    between them the frequency is a mix of both, linear in original / wavelength.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _divisors(head_dim, rope["rope_theta"], **{key: rope[key] for key in _LLAMA3})


def _divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def _original_lengths(head_dim: int, theta: float, divisors: Tensor) -> list[int]:
    """The original lengths that may have given these divisors. Where a frequency is a mix, the share of the mix gives the length;
    where none is, the length lies between the two at which the next frequency would be one."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if frequencies.shape != divisors.shape:
        return []
    inverse = 1 / divisors.double()
    kept = (inverse - inverse.min()) / (1 - inverse.min()).clamp(min=1e-12)
    found = []
    for frequency, share in zip(frequencies.tolist(), kept.tolist(), strict=True):
        length = (_LOW + share * (_HIGH - _LOW)) * 2 * math.pi / frequency
        found += [round(length)] if 0.01 < share < 0.99 else [math.ceil(length), math.floor(length)]
    return sorted({length for length in found if length > 0})


def config_of(fields: Mapping[str, Any], tensors: Iterable[str], divisors: Tensor | None) -> dict[str, Any]:
    """A config.json for the metadata and tensor names of a file. Raises TersorError where it is of another family.

    The file may lack vocab_size: the caller sees the embedding and sets it.
    """
    name = fields.get("general.architecture")
    found = next((kind for kind, each in ARCHITECTURES.items() if each.name == name), None)
    if found is None:
        known = ", ".join(dict.fromkeys(each.name for each in ARCHITECTURES.values()))
        raise TersorError(f"a GGUF file of the architecture {name!r}; tersor reads {known}")
    if fields.get(f"{name}.expert_count"):
        raise TersorError(f"a GGUF file of {name} with experts; tersor reads those without")

    def number(key: str, default: Any = None) -> Any:
        value = fields.get(f"{name}.{key}", default)
        if value is None:
            raise TersorError(f"the GGUF file lacks {name}.{key}")
        if isinstance(value, list):
            raise TersorError(f"the GGUF file has {name}.{key} per layer; tersor reads models whose layers are alike")
        fraction = key in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
        if isinstance(value, bool) or not isinstance(value, (int, float) if fraction else int):
            raise TersorError(f"the GGUF file has {name}.{key} {value!r}; a number is expected")
        if not 0 < value < math.inf:
            raise TersorError(f"the GGUF file has {name}.{key} {value}; it must be positive")
        return value

    for key in ("bos", "eos", "padding"):
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise TersorError(
                f"the GGUF file has tokenizer.ggml.{key}_token_id {token!r}; a token's number is expected"
            )
    names, heads = set(tensors), number("attention.head_count")
    hidden = number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    if number("attention.value_length", head_dim) != head_dim or number("rope.dimension_count", head_dim) != head_dim:
        raise TersorError(f"the GGUF file has heads of several widths: {name}.attention.key_length is {head_dim}")
    theta = number("rope.freq_base", 10000.0)
    return {
        "architectures": [found],
        "model_type": ARCHITECTURES[found].model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": theta, **_rope_of(fields, str(name), head_dim, theta, divisors)},
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(fields),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _ends(fields: Mapping[str, Any]) -> int | list[int] | None:
    """The tokens that end a text, a turn or a message: llama.cpp stops at each."""
    found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(each) for each in found if each is not None))
    return ends[0] if len(ends) == 1 else ends or None


def _rope_of(
    fields: Mapping[str, Any], name: str, head_dim: int, theta: float, divisors: Tensor | None
) -> dict[str, Any]:
    kind = fields.get(f"{name}.rope.scaling.type", "none")
    if divisors is not None and kind == "none":
        # A file has only the divisors. The published models differ only in the factor, which is the largest divisor.
        for original in (8192, *(2**n for n in range(9, 18)), *_original_lengths(head_dim, theta, divisors)):
            guess = {
                "factor": float(divisors.max()),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
            if torch.allclose(_divisors(head_dim, theta, **guess), divisors, rtol=1e-5):
                return {"rope_type": "llama3", **guess}
        raise TersorError(f"{FREQUENCIES} of the GGUF file is no llama3 scaling that tersor knows")
    if kind == "none":
        return {"rope_type": "default"}
    factor = float(fields.get(f"{name}.rope.scaling.factor", 1.0))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = fields[f"{name}.rope.scaling.original_context_length"]
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise TersorError(f"a GGUF file with rotary scaling of type {kind!r}; tersor reads none, linear and yarn")
