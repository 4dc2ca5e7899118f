"""A depthwise convolution over time that sees only the past, whole sequences or token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.kernels import mamba_cpu


class CausalConv1d(nn.Conv1d):
    """x [b, l, channels] -> y of that shape, and the next call's state: the last inputs, [b, channels, width - 1].

    Weights as nn.Conv1d has them, [channels, 1, width]. Where `mask` [b, l] is False the input counts as 0.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, *, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """silu: y is SiLU of the convolution."""
        if mask is not None:
            x = x * mask[..., None]
        if self.kernel_size[0] <= mamba_cpu.WIDEST and mamba_cpu.plain(x, self.weight, self.bias, state):
            return mamba_cpu.causal_conv(x, self.weight, self.bias, state, silu=silu)
        past = self.kernel_size[0] - 1
        x = x.transpose(1, 2)
        x = F.pad(x, (past, 0)) if state is None else torch.cat((state, x), -1)
        y = F.conv1d(x, self.weight, self.bias, groups=self.groups)
        y = y.transpose(1, 2)
        return F.silu(y) if silu else y, x[..., x.shape[-1] - past :]
