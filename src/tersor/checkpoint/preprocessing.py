"""How a model wants its images: from transformers' preprocessor_config.json, or from timm's config.json."""

from __future__ import annotations

import json
from typing import Any

from tersor.checkpoint.source import Checkpoint
from tersor.errors import TersorError

PREPROCESSOR = "preprocessor_config.json"


def image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """{"size": pixels, "mean": (r, g, b), "std": (r, g, b)}, of pixel values in [0, 1].

    Raises TersorError where the model says nothing of images.
    """
    file = checkpoint.directory / PREPROCESSOR
    if file.is_file():
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            size = said.get("crop_size") or said["size"]
            size = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
            return {"size": int(size), "mean": tuple(said["image_mean"]), "std": tuple(said["image_std"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TersorError(f"{file} does not say size, image_mean and image_std: {error}") from None
    timm = {**checkpoint.config, **(checkpoint.config.get("pretrained_cfg") or {})}
    size = timm["input_size"][-1] if "input_size" in timm else timm.get("img_size")
    if size is None or "mean" not in timm or "std" not in timm:
        raise TersorError(
            f"{checkpoint.directory} does not say how it wants its images: it has no {PREPROCESSOR}, and its config.json "
            "no img_size, mean and std"
        )
    return {"size": int(size), "mean": tuple(timm["mean"]), "std": tuple(timm["std"])}


def preprocessor_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a preprocessor_config.json that says the same."""
    side = settings["size"]
    return {
        "size": {"height": side, "width": side},
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }
