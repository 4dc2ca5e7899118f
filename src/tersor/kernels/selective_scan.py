"""Mamba-1's selective scan: a linear recurrence per channel whose parameters depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        h [b, d, n]: a state of n numbers for every channel
    y_t = h_t · C_t + D x_t,  then  y_t * SiLU(z_t)

x, dt, z [b, l, d]; A [d, n] negative; B, C [b, l, n] shared by the channels; D, dt_bias [d]; state [b, d, n]. All sums
are float32 (float64 for float64), y has x's dtype. With `dt_softplus`, softplus(dt + dt_bias) takes the place of dt. Where `mask`
[b, l] is False dt counts as 0, and a step with dt = 0 leaves the state as it is. So sequences of different lengths share a batch,
padded at either end.

`step` is the formula for one token, `reference` a loop over it. Models call `selective_scan`: the op `tersor::selective_scan`,
compiled on CPUs (mamba_cpu.cpp; without a compiler `chunked`, in torch) and in Triton on GPUs (selective_scan_triton.py). All
keep only the states between chunks of time; the backward pass, in torch on both, recomputes the rest from these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.kernels import mamba_cpu


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
) -> tuple[Tensor, Tensor]:
    """One token: x, dt, z [b, d], B, C [b, n]. Returns y [b, d] and the next state."""
    dt = time_step(dt, dt_bias=dt_bias, dt_softplus=dt_softplus)
    wide = dt.dtype
    decay = torch.exp(dt[..., None] * A.to(wide))
    state = decay * state + (dt * x.to(wide))[..., None] * B.to(wide)[:, None]
    y = (state * C.to(wide)[:, None]).sum(-1)
    return skip_and_gate(y, x, D=D, z=z), state


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
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [b, l, d] and the last state, token by token."""
    dt = time_step(dt, dt_bias=dt_bias, dt_softplus=dt_softplus, mask=mask)
    state = initial_state if initial_state is not None else dt.new_zeros(x.shape[0], *A.shape)
    ys = []
    for t in range(x.shape[1]):
        y, state = step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, z=None if z is None else z[:, t])
        ys.append(y)
    return torch.stack(ys, 1), state


def selective_scan(
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
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """As `reference`, fast. Differentiable in every tensor but `mask`. One token is a `step`.

    Beside the outputs it keeps l / chunk_size states; while it runs, chunk_size more.
    """
    if mask is None and mamba_cpu.plain(x, dt, A, B, C, D, z, dt_bias, initial_state):
        first = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
        moved = dt if dt_bias is None else dt + dt_bias
        if mamba_cpu.takes(x, moved, A, B, C, first, D=D, z=z):
            y, state, _ = mamba_cpu.scan(x, moved, A, B, C, first, D=D, z=z, dt_softplus=dt_softplus)
            return y, state
    dt = time_step(dt, dt_bias=dt_bias, dt_softplus=dt_softplus, mask=mask)
    wide = dt.dtype
    if initial_state is None:
        initial_state = dt.new_zeros(x.shape[0], *A.shape)
    if x.shape[1] == 1:
        z = None if z is None else z[:, 0]
        y, state = step(initial_state.to(wide), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D, z=z)
        return y[:, None], state
    tensors = (x.to(wide), dt, A.to(wide), B.to(wide), C.to(wide), initial_state.to(wide))
    y, state, _ = _selective_scan(*tensors, chunk_size)
    return skip_and_gate(y, x, D=D, z=z), state


def time_step(
    dt: Tensor, *, dt_bias: Tensor | None = None, dt_softplus: bool = False, mask: Tensor | None = None
) -> Tensor:
    """dt as the recurrence uses it, at least in float32."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt if mask is None else dt * mask[..., None]


def skip_and_gate(y: Tensor, x: Tensor, *, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) * SiLU(z), in x's dtype."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, *, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence itself in torch: y, the last state, and the state before each chunk [chunks, b, d, n]."""
    y, h, before = torch.empty_like(x), initial_state, []
    for start in range(0, x.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        before.append(h)
        _, states = _states(x[:, chunk], dt[:, chunk], A, B[:, chunk], h)
        y[:, chunk] = torch.einsum("lbdn,bln->bld", states, C[:, chunk])
        h = states[-1]
    return y, h, torch.stack(before)


@torch.library.custom_op("tersor::selective_scan", mutates_args=())
def _selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x, dt, A, B, C, initial_state)
    if mamba_cpu.plain(*(each.detach() for each in inputs)) and mamba_cpu.takes(*inputs):
        y, state, kept = mamba_cpu.scan(x, dt, A, B, C, initial_state, chunk_size=chunk_size)
        assert kept is not None
        return y, state, kept
    y, state, before = chunked(x, dt, A, B, C, initial_state, chunk_size=chunk_size)
    return y, state.clone(), before


@_selective_scan.register_kernel("cuda")
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    from tersor.kernels import selective_scan_triton

    return selective_scan_triton.forward(x, dt, A, B, C, initial_state, chunk_size)


@_selective_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (x.shape[1] + chunk_size - 1) // chunk_size
    return torch.empty_like(x), torch.empty_like(initial_state), initial_state.new_empty(chunks, *initial_state.shape)


@torch.library.custom_op("tersor::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    before: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, chunk by chunk from the last to the first.

    g_t = dL/dh_t = dy_t C_t + exp(dt_{t+1} A) g_{t+1} is the same recurrence run backwards.
    """
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(each) for each in (x, dt, B, C))
    grad_A = torch.zeros_like(A)
    carry = grad_state
    for index in reversed(range(before.shape[0])):
        chunk = slice(index * chunk_size, (index + 1) * chunk_size)
        decay, h = _states(x[:, chunk], dt[:, chunk], A, B[:, chunk], before[index])
        xs, dts, Bs, Cs, dys = (_time_first(each[:, chunk]) for each in (x, dt, B, C, grad_y))
        grad_C[:, chunk] = torch.einsum("lbd,lbdn->bln", dys, h)
        g = dys[..., None] * Cs[:, :, None]  # [l, b, d, n], in place from the last token on
        for t in reversed(range(g.shape[0])):
            g[t] += carry
            carry = decay[t] * g[t]
        grad_input = torch.einsum("lbdn,lbn->lbd", g, Bs)  # of dt x
        grad_B[:, chunk] = torch.einsum("lbdn,lbd->bln", g, dts * xs)
        g *= decay
        g[0] *= before[index]
        g[1:] *= h[:-1]  # g is now the gradient of the exponent dt A
        grad_x[:, chunk] = (dts * grad_input).transpose(0, 1)
        grad_dt[:, chunk] = (xs * grad_input + torch.einsum("lbdn,dn->lbd", g, A)).transpose(0, 1)
        grad_A += torch.einsum("lbdn,lbd->dn", g, dts)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, carry.clone()


@_selective_scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    before: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, B, C, state = (torch.empty_like(each) for each in (x, dt, A, B, C, grad_state))
    return x, dt, A, B, C, state


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt A) and the state after each token of a chunk, both [l, b, d, n]: all at once but the recurrence itself."""
    x, dt, B = _time_first(x), _time_first(dt), _time_first(B)
    decay = (dt[..., None] * A).exp_()
    states = (dt * x)[..., None] * B[:, :, None]
    for decay_t, state_t in zip(decay.unbind(), states.unbind(), strict=True):
        h = state_t.addcmul_(decay_t, h)
    return decay, states


def _time_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)  # [b, l, ...] -> [l, b, ...], so that a token's slice of the result is contiguous


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, dt, A, B, C, _, ctx.chunk_size = inputs
    ctx.save_for_backward(x, dt, A, B, C, output[2])


def _backward(ctx, grad_y: Tensor, grad_state: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    gradients = _selective_scan_backward(grad_y, grad_state, *ctx.saved_tensors, ctx.chunk_size)
    return *gradients, None


_selective_scan.register_autograd(_backward, setup_context=_setup_context)
