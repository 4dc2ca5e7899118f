"""One level of the dual-tree complex wavelet transform (Kingsbury 2001) with the filters near_sym_b, and its inverse.

    low, high = forward(x)        x (B, C, H, W) -> low (B, C, H, W), high (B, C, 6, H/2, W/2, 2)
    x = inverse(low, high)        equal to x to about 1e-6

x is filtered along its rows, then along its columns, by the low-pass filter h0 (13 taps) or the high-pass filter h1 (19),
at every position: nothing is dropped, so `low` keeps the size of x. Each of the three bands with a high-pass part is
read as 2x2 quads [a b; c d] / sqrt(2), which make two complex numbers, one of each diagonal direction:

    z1 = (a - d) + i (b + c),   z2 = (a + d) + i (b - c)

`high` holds six of them (axis 2: 15, 45, 75, 105, 135, 165 degrees), real and imaginary parts last. The synthesis filters are
g0[n] = (-1)^(n - 9) h1[n] and g1[n] = (-1)^(n - 6) h0[n]. Edges are mirrored with the edge sample repeated. An odd
height or width is made even by repeating the last row or column, which stay in `low`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to the centre tap; the other half mirrors it.
_H0 = [value / 8192 for value in (-14.4, 0.0, 182.4, -384.0, -395.2, 2432.0, 4550.4)]
_H1 = [
    value / (7 * 2**17)
    for value in (-64.8, 0.0, 1231.2, -1728.0, -6566.4, 21888.0, 51052.8, -47424.0, -275028.8, 513280.0)
]


def _mirrored(half: list[float]) -> list[float]:
    return half + half[-2::-1]


def _alternating(taps: list[float]) -> list[float]:
    """(-1)^(n - centre) taps[n]."""
    return [tap if (n - len(taps) // 2) % 2 == 0 else -tap for n, tap in enumerate(taps)]


H0, H1 = _mirrored(_H0), _mirrored(_H1)
G0, G1 = _alternating(H1), _alternating(H0)


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
    low_rows, high_rows = filter_rows(x, H0), filter_rows(x, H1)
    low = filter_columns(low_rows, H0)
    lh = _complex(filter_columns(low_rows, H1))
    hl = _complex(filter_columns(high_rows, H0))
    hh = _complex(filter_columns(high_rows, H1))
    return low, torch.stack((lh[0], hh[0], hl[0], hl[1], hh[1], lh[1]), 2)


def inverse(low: Tensor, high: Tensor) -> Tensor:
    z15, z45, z75, z105, z135, z165 = high.unbind(2)
    lh, hl, hh = _quads(z15, z165), _quads(z75, z105), _quads(z45, z135)
    high_rows = filter_columns(hh, G1) + filter_columns(hl, G0)
    low_rows = filter_columns(lh, G1) + filter_columns(low, G0)
    return filter_rows(high_rows, G1) + filter_rows(low_rows, G0)


def filter_rows(x: Tensor, taps: list[float]) -> Tensor:
    """x (B, C, H, W) correlated with `taps` along W; the length stays."""
    B, C, H, W = x.shape
    reach = len(taps) // 2
    places = torch.arange(-reach, W + reach, device=x.device) % (2 * W)  # mirrored edges have the period 2 W
    padded = x[..., torch.where(places < W, places, 2 * W - 1 - places)]
    weight = torch.tensor(taps, dtype=x.dtype, device=x.device).reshape(1, 1, 1, -1)
    return F.conv2d(padded.reshape(B * C, 1, H, -1), weight).reshape(B, C, H, W)


def filter_columns(x: Tensor, taps: list[float]) -> Tensor:
    return filter_rows(x.transpose(2, 3), taps).transpose(2, 3)


def _complex(band: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> z1, z2, each (B, C, H/2, W/2, 2)."""
    a, b = band[..., ::2, ::2], band[..., ::2, 1::2]
    c, d = band[..., 1::2, ::2], band[..., 1::2, 1::2]
    root = 2**-0.5
    return torch.stack((a - d, b + c), -1) * root, torch.stack((a + d, b - c), -1) * root


def _quads(z1: Tensor, z2: Tensor) -> Tensor:
    """The inverse: (B, C, H, W)."""
    (r1, s1), (r2, s2) = z1.unbind(-1), z2.unbind(-1)
    upper = torch.stack((r1 + r2, s1 + s2), -1).flatten(-2)  # rows a b a b ...
    lower = torch.stack((s1 - s2, r2 - r1), -1).flatten(-2)  # rows c d c d ...
    return torch.stack((upper, lower), -2).flatten(-3, -2) * 2**-0.5
