"""The module tree that a config.json describes, without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tersor.checkpoint.source import STEPS, Checkpoint
from tersor.errors import TersorError
from tersor.layers.exchange import EXCHANGED, exchange
from tersor.untrusted import first_words


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The module tree that a config.json describes, without weights, in eval mode."""
    module = _build(checkpoint, dtype)
    try:
        exchange(module, checkpoint.config.get(EXCHANGED, {}))
    except (AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise TersorError(
            f"{checkpoint.directory}: config.json's {EXCHANGED} cannot be read: {first_words(error)}"
        ) from error
    return module.eval()


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", EXCHANGED, STEPS)}
    if "tersor_model" in config:
        config.pop("id2label", None)  # the classes' names: no option of the model
    if "tersor_model" in config or ("architecture" in config and not config.get("architectures")):
        from tersor import models

        if "architecture" in config:  # timm's config.json mixes options with facts about the training
            config = models.options_of(config.pop("architecture"), config)
        name = config.pop("tersor_model")
        try:
            with torch.device("meta"):
                return models.create(name, **config).to(dtype)
        except TersorError:
            raise
        except Exception as error:  # as below
            raise TersorError(
                f"{checkpoint.directory}: {name} cannot be built from config.json: {first_words(error)}"
            ) from error
    import transformers

    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise TersorError(
            f"{checkpoint.directory}: config.json's architectures are {architectures!r}; expected a list of names"
        )
    kind = getattr(transformers, architectures[0], None) if architectures else None
    if kind is None:
        name = architectures[0] if architectures else "none"
        if config.get("auto_map"):
            raise TersorError(
                f"{checkpoint.directory}: the architecture {name!r} needs the model's own code, which tersor does not run"
            )
        raise TersorError(
            f"{checkpoint.directory}: config.json names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    try:
        if checkpoint.gguf is None:
            parsed = kind.config_class.from_pretrained(checkpoint.directory)
        else:
            parsed = kind.config_class.from_dict(config)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        for each in (parsed, *(getattr(parsed, name, None) for name in parsed.sub_configs)):
            if getattr(each, "_attn_implementation", None) not in (None, "eager", "sdpa", "flex_attention"):
                each._attn_implementation = (
                    None  # else transformers might run a kernel that the config names: code from the hub
                )
        with torch.device("meta"):
            # the plain loop multiplies with one expert at a time, which can be watched and replaced
            module: nn.Module = kind._from_config(parsed, dtype=dtype, experts_implementation="eager")
        _check_computed_buffers(checkpoint, module)
        _fill_computed_buffers(module)
    except TersorError:
        raise
    except Exception as error:  # a constructor may raise anything for numbers that do not fit
        raise TersorError(
            f"{checkpoint.directory}: {architectures[0]} cannot be built from config.json: {first_words(error)}"
        ) from error
    return module


def _fill_computed_buffers(module: Any) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, ...) by the model's own initialization. It does nothing
    to parameters on the meta device."""
    for each in module.modules():
        for name in each._non_persistent_buffers_set:
            buffer = each._buffers.get(name)
            if buffer is not None and buffer.is_meta:  # a buffer that is not on the meta device has its values
                each._buffers[name] = torch.zeros_like(buffer, device="cpu")
        each._is_hf_initialized = False
    module.initialize_weights()


def _check_computed_buffers(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raise TersorError where computed buffers, such as masks over all positions, would take far more memory than the checkpoint:
    then the config is wrong."""
    most = max(1 << 30, 8 * checkpoint.size())
    for name, buffer in module.named_buffers():
        if buffer.numel() * buffer.element_size() > most:
            raise TersorError(
                f"{checkpoint.directory}: config.json asks for a buffer {name} of {tuple(buffer.shape)}, which is more than "
                f"{most:,} bytes"
            )
