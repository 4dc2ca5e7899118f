"""Look-up-free quantization (LFQ; Yu et al., ICLR 2024, arXiv 2310.05737): each number of a vector becomes its sign.

    lfq = LFQ(dim=20, bits=6)
    values, indices = lfq(x)                     # x (..., 20) -> (..., 20) and whole numbers below 2^6
    loss = lfq.losses(x).total(entropy=0.1, commitment=0.25)

With z = W_in x (..., d), or x itself where dim = d:

    q = +1 where z > 0, else -1                  the gradient is that of z (straight-through)
    index = the bits z_j > 0, the first the highest;  values = W_out q
    p(code | z) = softmax over all 2^d codes c of 2 tau <z, c>
    entropy = mean of H(p(. | z)) - gamma H(mean of p)     sure of each code, and all codes used: down to -d ln 2
    commitment = mean (z - sg(q))^2                        in nats; logarithms are taken of 1e-5 at least

The entropies go over the whole code table, tokens * 2^d numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.straight_through import straight_through

MOST_BITS = 24  # a table of 2^24 codes


@dataclass(frozen=True)
class LFQLosses:
    """Scalars. In `entropy`, the layer's gamma weighs the batch's part."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor
    gamma: float

    def total(self, *, entropy: float, commitment: float) -> Tensor:
        """The weighted sum of both losses."""
        both = self.per_sample_entropy - self.gamma * self.batch_entropy
        return entropy * both + commitment * self.commitment


class LFQ(nn.Module):
    """x (..., dim) -> values (..., dim), indices (...)."""

    def __init__(self, dim: int, bits: int, *, gamma: float = 1.0, inv_temperature: float = 100.0) -> None:
        super().__init__()
        if not 1 <= bits <= MOST_BITS:
            raise TersorError(f"look-up-free quantization has 1 to {MOST_BITS} bits, not {bits}")
        self.bits, self.gamma, self.inv_temperature = bits, gamma, inv_temperature
        self.project_in = nn.Linear(dim, bits) if dim != bits else nn.Identity()
        self.project_out = nn.Linear(bits, dim) if dim != bits else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.project_in(x)
        return self.project_out(straight_through(signs(z), z)), to_indices(z)

    def values(self, indices: Tensor) -> Tensor:
        """The values that `forward` returns with these indices."""
        weight = next(self.project_out.parameters(), None)
        codes = to_codes(indices, self.bits)
        made: Tensor = self.project_out(codes if weight is None else codes.to(weight.dtype))
        return made

    def losses(self, x: Tensor) -> LFQLosses:
        z = self.project_in(x).flatten(0, -2)  # (tokens, d)
        table = to_codes(torch.arange(2**self.bits, device=z.device), self.bits).to(z.dtype)
        p = (2 * (z @ table.T) * self.inv_temperature).softmax(-1)  # (tokens, 2^d), rounded in the published order
        commitment = F.mse_loss(z, signs(z))
        return LFQLosses(_entropy(p).mean(), _entropy(p.mean(0)), commitment, self.gamma)


def signs(z: Tensor) -> Tensor:
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype)


def to_indices(z: Tensor) -> Tensor:
    """(..., d) -> (...): the signs as bits, the first the highest."""
    places = 2 ** torch.arange(z.shape[-1] - 1, -1, -1, device=z.device)
    return ((z > 0).long() * places).sum(-1)


def to_codes(indices: Tensor, bits: int) -> Tensor:
    """(...) -> (..., bits) float32 of -1 and 1, the inverse."""
    shifts = torch.arange(bits - 1, -1, -1, device=indices.device)
    return (torch.bitwise_right_shift(indices[..., None], shifts) & 1).float() * 2 - 1


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-5).log()).sum(-1)
