"""Mamba-2's state-space dual (SSD): a linear recurrence per head with one scalar decay, computed as matmuls in chunks.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ        S [b, h, p, n]: a matrix for every head
    y_t = S_t C_t + D x_t,  then  y_t * SiLU(z_t)

x, z [b, l, h, p]; dt [b, l, h]; A, dt_bias [h], A negative; B, C [b, l, g, n], group g serves heads g h/G ... ; D [h] or [h,
p]. All sums are float32 (float64 for float64), y has x's dtype. With `dt_softplus`, softplus(dt + dt_bias), clamped to
`dt_limit`, takes the place of dt. Where `mask` [b, l] is False it counts as 0, which leaves the state as it is.

With X_t = dt_t x_t and a_t the sum of dt A up to t, counted from the start of t's chunk, a chunk's outputs are

    Y_t = sum_{s <= t} (C_t · B_s) exp(a_t - a_s) X_s  +  exp(a_t) S C_t        S: the state before the chunk

which is exact for every chunk size: only S goes from chunk to chunk.

`step` is the formula for one token, `reference` a loop over it. Models call `ssd`: the op `tersor::ssd`, in torch on CPUs
(`chunked`) and in Triton on GPUs (ssd_triton.py). The backward pass runs through `chunked` on both.

`non_causal` is the form without an order: all tokens read the state after the last one.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from tersor.kernels.selective_scan import skip_and_gate, time_step

Limits = tuple[float, float]
NO_LIMIT: Limits = (0.0, float("inf"))


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """One token: x, z [b, h, p], dt [b, h], B, C [b, g, n]. Returns y [b, h, p] and the next state."""
    dt = _limited_time_step(dt, dt_bias, dt_softplus, dt_limit, None)
    wide, heads_per_group = dt.dtype, x.shape[1] // B.shape[1]
    B, C = (repeat(each.to(wide), "b g n -> b (g r) 1 n", r=heads_per_group) for each in (B, C))
    decay = torch.exp(dt * A.to(wide))[..., None, None]
    state = decay * state + (dt[..., None] * x.to(wide))[..., None] * B
    y = (state * C).sum(-1)
    return skip_and_gate(y, x, D=_per_channel(D), z=z), state


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [b, l, h, p] and the last state, token by token."""
    dt = _limited_time_step(dt, dt_bias, dt_softplus, dt_limit, mask)
    state = initial_state if initial_state is not None else _no_state(x, dt, B)
    ys = []
    for t in range(x.shape[1]):
        y, state = step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, z=None if z is None else z[:, t])
        ys.append(y)
    return torch.stack(ys, 1), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """As `reference`, fast. Differentiable in every tensor but `mask`. One token is a `step`.

    The GPU picks a chunk size of its own.
    """
    dt = _limited_time_step(dt, dt_bias, dt_softplus, dt_limit, mask)
    initial_state = _no_state(x, dt, B) if initial_state is None else initial_state.to(dt.dtype)
    if x.shape[1] == 1:
        z = None if z is None else z[:, 0]
        y, state = step(initial_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D, z=z)
        return y[:, None], state
    y, state = _ssd(x, dt, A.to(dt.dtype), B, C, initial_state, chunk_size)
    return skip_and_gate(y, x, D=_per_channel(D), z=z), state


def non_causal(x: Tensor, weights: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None) -> Tensor:
    """Non-causal SSD (arXiv 2407.18559): S = sum_t w_t x_t B_tᵀ, y_t = S C_t + D x_t. Returns y [b, l, h, p].

    weights [b, l, h], of any sign. S is the last state of `ssd` with dt = w and A = 0; here it takes two matmuls. With several
    groups head i reads group i mod g, as in that paper; in `ssd` neighbouring heads share a group.
    """
    wide = torch.promote_types(weights.dtype, torch.float32)
    X = rearrange(weights[..., None].to(wide) * x.to(wide), "b l (r g) p -> b g l (r p)", g=B.shape[2])
    B, C = (rearrange(each.to(wide), "b l g n -> b g l n") for each in (B, C))
    y = C @ (B.mT @ X)
    y = rearrange(y, "b g l (r p) -> b l (r g) p", p=x.shape[-1])
    return skip_and_gate(y, x, D=_per_channel(D), z=None)


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, *, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The recurrence itself in plain torch: y [b, l, h, p] in dt's dtype and the last state."""
    length, groups = x.shape[1], B.shape[2]
    Q = min(chunk_size, length)
    spare = -length % Q  # tokens with dt = 0 at the end change nothing
    X = F.pad(dt[..., None] * x, (0, 0, 0, 0, 0, spare))
    a = F.pad(dt * A, (0, 0, 0, spare))
    B, C = (F.pad(each.to(dt.dtype), (0, 0, 0, 0, 0, spare)) for each in (B, C))

    X = rearrange(X, "b (c l) (g r) p -> b c g r l p", l=Q, g=groups)
    a = rearrange(a, "b (c l) (g r) -> b c g r l", l=Q, g=groups).cumsum(-1)
    B, C = (rearrange(each, "b (c l) g n -> b c g 1 l n", l=Q) for each in (B, C))

    future = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(future, -torch.inf).exp()  # [b, c, g, r, l, s]
    Y = (C @ B.mT * decay) @ X

    gained = (torch.exp(a[..., -1:] - a)[..., None] * X).mT @ B  # [b, c, g, r, p, n]: what each chunk adds to the state
    kept = torch.exp(a[..., -1])[..., None, None]
    state, before = rearrange(initial_state, "b (g r) p n -> b g r p n", g=groups), []
    for c in range(X.shape[1]):
        before.append(state)
        state = kept[:, c] * state + gained[:, c]
    Y = Y + torch.exp(a)[..., None] * (C @ torch.stack(before, 1).mT)
    y = rearrange(Y, "b c g r l p -> b (c l) (g r) p")[:, :length]
    return y, rearrange(state, "b g r p n -> b (g r) p n")


@torch.library.custom_op("tersor::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    y, state = chunked(x, dt, A, B, C, initial_state, chunk_size=chunk_size)
    return y.contiguous(), state.clone()


@_ssd.register_kernel("cuda")
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    from tersor.kernels import ssd_triton

    return ssd_triton.forward(x, dt, A, B, C, initial_state)


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return dt.new_empty(x.shape), torch.empty_like(initial_state)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y: Tensor, grad_state: Tensor):  # type: ignore[no-untyped-def]
    with torch.enable_grad():
        tensors = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        outputs = chunked(*tensors, chunk_size=ctx.chunk_size)
    return *torch.autograd.grad(outputs, tensors, (grad_y, grad_state)), None


_ssd.register_autograd(_backward, setup_context=_setup_context)


def _limited_time_step(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits, mask: Tensor | None
) -> Tensor:
    dt = time_step(dt, dt_bias=dt_bias, dt_softplus=dt_softplus)
    if tuple(dt_limit) != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    return dt if mask is None else dt * mask[..., None]


def _no_state(x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
    return dt.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])


def _per_channel(D: Tensor | None) -> Tensor | None:
    return D[:, None] if D is not None and D.dim() == 1 else D  # [h] or [h, p], beside x [..., h, p]
