"""Small random models of the families that GGUF files are written of, with the demo's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.source import resolve


def random_model(family: str, folder: Path, **changes: Any) -> Path:
    """Two narrow layers; every parameter is random, norms and biases too."""
    import transformers

    torch.manual_seed(0)
    numbers = {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64 if family == "Qwen3" else 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**{**numbers, **changes})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve("demo") / name, folder / name)
    return folder
