"""CED, the convolutional encoder-decoder: a convolution to r channels, then one of kernel 1 to all of them.

Greenformers (Cahyawijaya, arXiv 2108.10808), whose tensor names these are: `ced_unit.0.weight` [r, in / groups, *kernel],
`ced_unit.1.weight` [out, r, 1, ...], `ced_unit.1.bias`. The first convolution has the original's stride, padding, dilation and
groups, and no bias; the second is not grouped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.exchange import exchangeable


@exchangeable
class CED(nn.Module):
    """Drop-in for nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    def __init__(self, original: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int) -> None:
        """original: the convolution to replace. rank: any number that its groups divide."""
        super().__init__()
        if rank % original.groups:
            raise TersorError(f"rank {rank} is not divisible by the convolution's {original.groups} groups")
        kind: Any = type(original)
        like = {"device": original.weight.device, "dtype": original.weight.dtype}
        self.rank = rank
        self.in_channels, self.out_channels, self.groups = original.in_channels, original.out_channels, original.groups
        self.kernel_size, self.stride = original.kernel_size, original.stride
        self.padding, self.dilation = original.padding, original.dilation
        encoder = kind(
            original.in_channels,
            rank,
            original.kernel_size,
            stride=original.stride,
            padding=original.padding,
            dilation=original.dilation,
            groups=original.groups,
            bias=False,
            padding_mode=original.padding_mode,
            **like,
        )
        self.ced_unit = nn.Sequential(
            encoder, kind(rank, original.out_channels, 1, bias=original.bias is not None, **like)
        )

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def in_place_of(cls, original: nn.Module, rank: int) -> CED:
        if not isinstance(original, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise TersorError(f"a CED takes the place of a convolution, not of a {type(original).__name__}")
        return cls(original, rank)

    @property
    def weight(self) -> Tensor:
        """The kernel of the one convolution without groups that computes the same, [out, in, *kernel]; a new tensor at every
        access, for code that looks at a layer's weight instead of calling it."""
        encoder, decoder = (each.weight for each in self.ced_unit)
        assert isinstance(encoder, Tensor)
        assert isinstance(decoder, Tensor)
        spread: Tensor = torch.block_diag(*encoder.flatten(1).chunk(self.groups))  # type: ignore[no-untyped-call]
        # spread [r, in · kernel]
        return (decoder.flatten(1) @ spread).view(self.out_channels, self.in_channels, *encoder.shape[2:])

    @property
    def bias(self) -> Tensor | None:
        return self.ced_unit[1].bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ced_unit(x)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
