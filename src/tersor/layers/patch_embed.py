"""The check of an image's size before it becomes tokens; the message names sizes that work."""

from __future__ import annotations

from torch import Tensor

from tersor.errors import TersorError


def check_image(model: str, image: Tensor, *, channels: int, multiple: int = 1, at_least: int = 1) -> None:
    """Raise TersorError unless the image is (B, channels, H, W), with sides that are multiples of `multiple`, at least
    `at_least`."""
    if image.dim() != 4 or image.shape[1] != channels:
        raise TersorError(f"{model} takes images (batch, {channels}, height, width), not {list(image.shape)}")
    height, width = image.shape[-2:]
    if min(height, width) < at_least:
        raise TersorError(f"{model} needs images of at least {at_least} x {at_least} pixels, not {height} x {width}")
    if height % multiple or width % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise TersorError(
            f"{model} takes images whose sides are multiples of {multiple}, not {height} x {width}; "
            f"{near[0]} x {near[1]} works"
        )
