"""How a model wants its images: from transformers' preprocessor_config.json, or from timm's config.json.

Where a preprocessor_config.json names one of transformers' processors, transformers itself prepares the images
(`image_processor`): resizing, cropping, filters and rescaling are then as in training. Other files, and timm's configs, say
size, crop_pct, interpolation, mean and std (`image_settings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.checkpoint.source import Checkpoint
from tersor.errors import TersorError
from tersor.untrusted import first_words, pretrained, read_json_object

PREPROCESSOR = "preprocessor_config.json"
LARGEST = 1 << 13  # pixels of a side
TIMM_CROP = 0.875  # the crop_pct of a config of timm's that says none
_SIZES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


def image_processor(checkpoint: Checkpoint) -> Callable[[Any], Tensor] | None:
    """A function from an RGB image of Pillow to a tensor (3, H, W), by transformers; None where no processor is named."""
    file = checkpoint.directory / PREPROCESSOR
    if not file.is_file():
        return None
    said = read_json_object(file)
    if not (said.get("image_processor_type") or said.get("feature_extractor_type") or said.get("auto_map")):
        return None
    for name in ("size", "crop_size", "pad_size"):
        _check_sides(f"{file}: {name}", said.get(name))
    from transformers import AutoImageProcessor

    processor = pretrained(AutoImageProcessor, checkpoint.directory, "image processor")

    def process(image: Any) -> Tensor:
        try:
            found = processor(images=image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # the config's numbers may contradict each other
            raise TersorError(f"{file} cannot be carried out: {first_words(error)}") from error
        if not isinstance(found, Tensor) or found.dim() != 4 or not bool(torch.isfinite(found).all()):
            raise TersorError(f"{file} makes no single image of finite values (3, H, W) for a classifier")
        return found[0]

    return process


def image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """{"size": pixels, "mean": (r, g, b), "std": (r, g, b), ...}, of pixel values in [0, 1]; the fields of an ImageConfig.

    Raises TersorError where the model says nothing of images.
    """
    file = checkpoint.directory / PREPROCESSOR
    if file.is_file():
        said = read_json_object(file)
        try:
            size = said.get("crop_size") or said["size"]
            size = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
            more: dict[str, Any] = {key: said[key] for key in ("resize", "filter") if key in said}
            if isinstance(more.get("resize"), list):
                more["resize"] = tuple(more["resize"])
            return {"size": _side(size), "mean": tuple(said["image_mean"]), "std": tuple(said["image_std"]), **more}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TersorError(f"{file} does not say size, image_mean and image_std: {error}") from None
    trained = checkpoint.config.get("pretrained_cfg") or {}
    if not isinstance(trained, Mapping):
        raise TersorError(f"{checkpoint.directory}: config.json's pretrained_cfg is {trained!r}")
    timm = {**checkpoint.config, **trained}
    try:
        size = timm["input_size"][-1] if "input_size" in timm else timm.get("img_size")
        if size is None or "mean" not in timm or "std" not in timm:
            raise TersorError(
                f"{checkpoint.directory} does not say how it wants its images: it has no {PREPROCESSOR}, and its config.json "
                "no img_size, mean and std"
            )
        settings: dict[str, Any] = {"size": _side(size), "mean": tuple(timm["mean"]), "std": tuple(timm["std"])}
        return settings | _timm_resize(timm, settings["size"], whole="pretrained_cfg" not in checkpoint.config)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TersorError(f"{checkpoint.directory}: config.json says its images wrongly: {error}") from None


def saved_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the inputs of a model without images are prepared, as `tersor train` wrote it beside the model; {} where it wrote
    none."""
    file = checkpoint.directory / PREPROCESSOR
    return read_json_object(file) if file.is_file() else {}


def _timm_resize(timm: Mapping[str, Any], size: int, *, whole: bool) -> dict[str, Any]:
    """timm resizes to size / crop_pct and cuts out the centre; with `squash` both sides are resized. whole: nothing is cut off
    where the config has no crop_pct."""
    share = timm.get("crop_pct", 1.0 if whole else TIMM_CROP)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.1 <= share <= 1:
        raise ValueError(f"crop_pct is {share!r}; above 0.1 and at most 1 is read")
    mode = timm.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode is {mode!r}; center and squash are read")
    to = math.floor(size / share)
    return {"resize": (to, to) if mode == "squash" else to, "filter": timm.get("interpolation") or "bicubic"}


def _side(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise ValueError(f"the size {size!r} is not from 1 to {LARGEST} pixels")
    return size


def _check_sides(what: str, said: Any) -> None:
    """Raise TersorError where a side is no number of pixels."""
    sides = [said[key] for key in _SIZES if said.get(key) is not None] if isinstance(said, Mapping) else [said]
    for each in sides:
        for side in each if isinstance(each, list) else [each]:
            try:
                if side is not None:
                    _side(side)
            except ValueError as error:
                raise TersorError(f"{what}: {error}") from None


def class_names(checkpoint: Checkpoint) -> list[str] | None:
    """The model's own names of its classes, by number. None where it has none, or only LABEL_0, LABEL_1, ..."""
    said: Any = checkpoint.config.get("id2label")
    if isinstance(said, Mapping) and said:
        numbered = {str(key): name for key, name in said.items()}
        names: Any = [numbered.get(str(n)) for n in range(len(numbered))]
    else:
        trained = checkpoint.config.get("pretrained_cfg")
        names = checkpoint.config.get("labels") or checkpoint.config.get("label_names")
        names = names or (trained.get("label_names") if isinstance(trained, Mapping) else None)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return None if all(name == f"LABEL_{n}" for n, name in enumerate(names)) else names


def preprocessor_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a preprocessor_config.json that says the same."""
    side = settings["size"]
    return {
        "size": {"height": side, "width": side},
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        **{key: settings[key] for key in ("resize", "filter") if key in settings},
    }
