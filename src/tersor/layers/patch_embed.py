"""Images to tokens: the check of an image's size, with the sizes that work in the message."""

from __future__ import annotations

from torch import Tensor

from tersor.errors import TersorError


def check_image(model: str, image: Tensor, *, channels: int, multiple: int = 1, at_least: int = 1) -> None:
    """image (B, channels, H, W) with both sides multiples of `multiple` and not below `at_least`, else a TersorError."""
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
