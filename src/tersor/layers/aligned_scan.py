"""The selective scan over kept tokens only, whose states decay as if all tokens were there.

Token pruning for state-space models (Zhan et al., NeurIPS 2024, arXiv 2409.18962): a dropped token no longer feeds the state, but
the state still decays over its place. Between consecutive kept tokens p < q

    h_q = exp(span_q A) h_p + dt_q x_q B_q          span_q: the sum of dt over p + 1 .. q
    y_q = C_q . h_q + D x_q

so the cost is that of the kept tokens alone. With span = dt it is the plain scan of the kept tokens, as if they had been
neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.kernels.selective_scan import selective_scan


def aligned_scan(
    x: Tensor, dt: Tensor, span: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None
) -> Tensor:
    """x, dt, span [b, k, d] of the kept tokens (dt as the recurrence uses it), A [d, n], B, C [b, k, n] -> y [b, k, d].

    It is the scan with time steps `span` whose inputs are x dt / span, so that the drive is still dt x B.
    """
    fed = x * (dt / span.clamp(min=torch.finfo(span.dtype).tiny))
    y, _ = selective_scan(fed, span, A, B, C)
    return y if D is None else y + D * x


def spans(dt: Tensor, kept: Tensor) -> Tensor:
    """dt [b, l, d] of all tokens, kept [b, k] ascending places -> [b, k, d]: the sum of dt since the kept token before."""
    until = dt.cumsum(1).gather(1, kept[..., None].expand(-1, -1, dt.shape[-1]))
    return torch.diff(until, dim=1, prepend=torch.zeros_like(until[:, :1]))


def gaps(places: Tensor) -> Tensor:
    """places [b, k], monotone -> [b, k]: the distance to the kept token before; 1 for the first."""
    return torch.cat((torch.ones_like(places[:, :1]), places.diff(dim=1).abs()), 1)


def importance(y: Tensor) -> Tensor:
    """y [b, l, d], a scan's outputs -> [b, l]: the sum of the positive ones over channels."""
    return y.clamp(min=0).sum(-1)
