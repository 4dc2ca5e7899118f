"""A vector quantizer: each vector becomes its nearest code; codes follow the vectors by moving averages.

VQ-VAE (van den Oord et al., arXiv 1711.00937, appendix A.1): with the vectors z that chose code k in a batch,

    n_k <- decay n_k + (1 - decay) |z_k|,   m_k <- decay m_k + (1 - decay) sum z_k,   e_k = m_k / n_k

with n smoothed by `eps` so that no unused code divides by zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.straight_through import straight_through


class Quantized(NamedTuple):
    values: Tensor  # (..., d): codes forward, the gradient of the input backward
    codes: Tensor  # (...): which code, int64
    commitment: Tensor  # scalar: mean squared distance of the input to its (constant) code


class Codebook(nn.Module):
    """z (..., d) -> Quantized. In training mode the codes follow the data; they get no gradient."""

    embed: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, d: int, *, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        start = torch.randn(codes, d)
        self.register_buffer("embed", start)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", start.clone())

    def forward(self, z: Tensor) -> Quantized:
        flat = z.reshape(-1, z.shape[-1])
        index = nearest(flat.detach(), self.embed)
        codes = self.embed[index].reshape(z.shape)
        if self.training:
            self._follow(flat.detach(), index)
        return Quantized(straight_through(codes, z), index.reshape(z.shape[:-1]), F.mse_loss(z, codes.detach()))

    @torch.no_grad()
    def _follow(self, z: Tensor, index: Tensor) -> None:
        chosen = F.one_hot(index, len(self.embed)).to(z.dtype)  # (n, codes)
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(chosen.t() @ z, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + len(self.counts) * self.eps) * total
        self.embed.copy_(self.sums / smoothed[:, None])


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """z (n, d), codes (k, d) -> (n,): the index of the nearest code by Euclidean distance, the first of equals."""
    distance = codes.square().sum(1) - 2 * z @ codes.t()  # without |z|^2, the same for all codes
    return distance.argmin(1)
