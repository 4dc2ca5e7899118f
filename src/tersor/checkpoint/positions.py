"""How many tokens a model has positions for: as its config says, less the rows of its table that hold no position."""

from __future__ import annotations

from typing import Any

from torch import nn

# Configs of models with several parts: where they keep the part that reads or writes text.
TEXT_PARTS = ("text_config", "text_encoder", "decoder", "generator", "encoder")


def positions_of(module: nn.Module) -> int | None:
    """The longest text that the model can read, in tokens, or None where it does not say.

    Models like RoBERTa count positions from padding_idx + 1 on, so the first padding_idx + 1 rows of their table hold none.
    """
    counts = [
        count
        for config in _text_configs(getattr(module, "config", None))
        if type(count := getattr(config, "max_position_embeddings", None)) is int and count > 0
    ]
    if not counts:
        return None
    most = min(counts)
    for name, each in module.named_modules():
        first = getattr(each, "padding_idx", None)
        if first is not None and "position" in name and getattr(each, "num_embeddings", None) == most:
            return most - int(first) - 1
    return most


def _text_configs(config: Any) -> list[Any]:
    if not hasattr(config, "get_text_config"):
        return [config]
    try:
        return [config.get_text_config()]
    except ValueError:  # transformers raises this where there are several
        return [part for name in TEXT_PARTS if (part := getattr(config, name, None)) is not None]
