"""Recurrent networks with heads: LSTM, GRU, Elman and sLSTM, one op for a whole sequence (FlashRNN, arXiv 2412.07752).

    g_t = W x_t + R h_{t-1} + b,   state_t = P(g_t, state_{t-1})        h, the output, is the first state

N heads of width D do not mix within a step: R has one D x D block per head and gate. With s(x) = 1 / (1 + exp(-x)):

    lstm   gates i f z o   c' = s(f) c + s(i) tanh(z)                              h' = s(o) tanh(c')
    gru    gates g r z n   h' = s(z) h + (1 - s(z)) tanh(n + s(r) g)
    elman  gate g          h' = tanh(g)
    slstm  gates i f z o   m' = max(i, log s(f) + m)       (= i while the whole tensor n is zero: the start)
                           new = exp(i - m'),  old = exp(log s(f) + m - m'),  c' = old c + new tanh(z)
                           n' = max(old n + new, 1)                                    h' = s(o) c' / n'

The gates of x are i f z o, g, and r z n for the GRU: its g has no input part and its n no recurrent part, so g r z are
its recurrent gates, and b has all four (b_g is cuDNN's second bias of n).

Wx [B, T, G, N, D], R [G, N, D_out, D_in], b [G, N, D], states [S, B, 1, N, D]; results: every state after every step,
[S, B, T, N, D], and the last ones, [S, B, 1, N, D]. Other orders of the axes by the `*_shape` arguments.

`step` is the formula for one token, `reference` a loop over it whose gradient is autograd's. Models call `flashrnn`: the op
`tersor::flashrnn`, which works on [T, N, B, G, D], so that a step is one batched product. Its backward pass recomputes all
gates from the stored states by one large product, walks back over the steps with the derivatives below (only R^T times the
gates' gradients is serial), and sums the gradients of R by one large product again. Sums are float32 (float64 for float64),
results have Wx's dtype. On a GPU Triton does both walks for float32 (flashrnn_triton.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.flashrnn_cells import CELLS, with_input


def update(function: str, gates: Tensor, states: Tensor) -> Tensor:
    """P: gates [..., G, D] before their nonlinearities, states [S, ..., D] -> the next states [S, ..., D]."""
    if function == "elman":
        return gates.tanh().squeeze(-2)[None]
    if function == "gru":
        g, r, z, n = gates.unbind(-2)
        z = z.sigmoid()
        return (z * states[0] + (1 - z) * (n + r.sigmoid() * g).tanh())[None]
    i, f, z, o = gates.unbind(-2)
    if function == "lstm":
        c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
        return torch.stack((o.sigmoid() * c.tanh(), c))
    _, c, n, m = states
    kept = F.logsigmoid(f) + m
    m = torch.where((n == 0).all(), i, torch.maximum(i, kept))
    new, old = (i - m).exp(), (kept - m).exp()
    c, n = old * c + new * z.tanh(), (old * n + new).clamp(min=1)
    return torch.stack((o.sigmoid() * c / n, c, n, m))


def update_backward(function: str, gates: Tensor, states: Tensor, after: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of the states before, from those of the states after, `grad` [S, ..., D]."""
    if function == "elman":
        return ((1 - after[0].square()) * grad[0]).unsqueeze(-2), torch.zeros_like(grad)
    if function == "gru":
        g, r, z, n = gates.unbind(-2)
        r, z = r.sigmoid(), z.sigmoid()
        u = (n + r * g).tanh()
        d_n = (1 - z) * (1 - u.square()) * grad[0]
        d_z = (states[0] - u) * z * (1 - z) * grad[0]
        return torch.stack((r * d_n, g * r * (1 - r) * d_n, d_z, d_n), -2), z * grad
    i, f, z, o = gates.unbind(-2)
    z, o = z.tanh(), o.sigmoid()
    if function == "lstm":
        i, f, tanh_c = i.sigmoid(), f.sigmoid(), after[1].tanh()
        d_c = grad[1] + grad[0] * o * (1 - tanh_c.square())
        d_o = grad[0] * tanh_c * o * (1 - o)
        d_gates = (d_c * z * i * (1 - i), d_c * states[1] * f * (1 - f), d_c * i * (1 - z.square()), d_o)
        return torch.stack(d_gates, -2), torch.stack((torch.zeros_like(d_c), d_c * f))
    _, c, n, m = states
    _, c_after, n_after, m_after = after
    kept = F.logsigmoid(f) + m
    new, old = (i - m_after).exp(), (kept - m_after).exp()
    d_c = grad[1] + grad[0] * o / n_after
    d_n = (grad[2] - grad[0] * o * c_after / n_after.square()) * (old * n + new >= 1)
    d_new, d_old = (d_c * z + d_n) * new, (d_c * c + d_n * n) * old  # of their exponents
    d_m = grad[3] - d_new - d_old
    by_input = (n == 0).all() | (i >= kept)  # m' = i
    d_i, d_kept = d_new + d_m * by_input, d_old + d_m * ~by_input
    d_gates = (d_i, d_kept * (-f).sigmoid(), d_c * new * (1 - z.square()), grad[0] * c_after / n_after * o * (1 - o))
    return torch.stack(d_gates, -2), torch.stack((torch.zeros_like(d_c), d_c * old, d_n * old, d_kept))


def step(Wx: Tensor, R: Tensor, b: Tensor, states: Tensor, *, function: str) -> Tensor:
    """One token: Wx [B, G, N, D], states [S, B, N, D] -> the next states."""
    cell = CELLS[function]
    gates = b.transpose(0, 1).repeat(len(Wx), 1, 1, 1)  # [B, N, G, D]
    gates[:, :, cell.inputs] += Wx.transpose(1, 2)
    gates[:, :, cell.recurrents] += torch.einsum("gnoi,bni->bngo", R, states[0])
    return update(function, gates, states)


def reference(
    Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None = None, *, function: str = "lstm"
) -> tuple[Tensor, Tensor]:
    """The formula, token by token, in Wx's dtype."""
    B, _, _, N, D = Wx.shape
    state = Wx.new_zeros(CELLS[function].states, B, N, D) if states is None else states[:, :, 0]
    after = []
    for t in range(Wx.shape[1]):
        state = step(Wx[:, t], R, b, state, function=function)
        after.append(state)
    return torch.stack(after, 2), state[:, :, None]


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    *,
    function: str = "lstm",
    input_shape: str = "BTGHD",
    output_shape: str = "SBTHD",
    recurrent_shape: str = "GHDP",
    bias_shape: str = "GHD",
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference`, fast; differentiable in every tensor. fused: by Triton's kernels, for float32 on
    a GPU; None: where they run.
    Axes: B batch, T time, G gates, H heads, D width, P width
    of the state before, S states; `states` has the order of the output."""
    _one_of("function", function, *CELLS)
    cell = CELLS[function]
    Wx = _ordered("input_shape", input_shape, Wx, "TBGHD", "BTGHD").transpose(2, 3).transpose(1, 2)  # [T, N, B, G, D]
    R = _ordered("recurrent_shape", recurrent_shape, R, "HPGD", "GHDP", "HGDP", "HPDG")  # [N, D_in, G, D_out]
    b = _ordered("bias_shape", bias_shape, b, "HGD", "GHD", "HDG")
    _one_of("output_shape", output_shape, *_OUTPUTS)
    T, N, B, _, D = Wx.shape
    start = Wx.new_zeros(cell.states, N, B, D)
    if states is not None:
        states = _ordered("output_shape", output_shape, states, *_OUTPUTS)
        _check("states", states, (cell.states, B, 1, N, D), function)
        start = states[:, :, 0].transpose(1, 2)
    _check("Wx", Wx, (T, N, B, cell.input_gates, D), function)
    _check("R", R, (N, D, cell.recurrent_gates, D), function)
    _check("b", b, (N, cell.gates, D), function)
    wide = torch.promote_types(Wx.dtype, torch.float32)
    if fused is None:
        fused = Wx.is_cuda and wide == torch.float32 and importlib.util.find_spec("triton") is not None
    if fused and (not Wx.is_cuda or wide != torch.float32):
        raise TersorError(f"flashrnn's fused kernels take float32 on a GPU, not {wide} on {Wx.device}; leave fused out")
    tensors = [each.to(wide).contiguous() for each in (Wx, R, b, start)]
    after = _flashrnn(tensors[0], tensors[1], tensors[2], tensors[3], function, fused)
    after = after.permute(0, 3, 1, 2, 4).to(Wx.dtype)  # [S, B, 1 + T, N, D]
    return _permuted(after[:, :, 1:], "SBTHD", output_shape), _permuted(after[:, :, -1:], "SBTHD", output_shape)


_OUTPUTS = ("SBTHD", "STBHD", "SBHTD")


def _one_of(option: str, value: str, *known: str) -> None:
    if value not in known:
        raise TersorError(f"flashrnn's {option} is one of {', '.join(map(repr, known))}, not {value!r}")


def _permuted(tensor: Tensor, order: str, wanted: str) -> Tensor:
    return tensor.permute([order.index(axis) for axis in wanted])


def _ordered(option: str, order: str, tensor: Tensor, wanted: str, *others: str) -> Tensor:
    _one_of(option, order, wanted, *others)
    if tensor.ndim != len(order):
        raise TersorError(f"flashrnn's {option} {order!r} needs {len(order)} axes, not those of {list(tensor.shape)}")
    return _permuted(tensor, order, wanted)


def _check(name: str, tensor: Tensor, shape: Sequence[int], function: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise TersorError(f"flashrnn's {name} for a {function} should be {list(shape)}, not {list(tensor.shape)}")


@torch.library.custom_op("tersor::flashrnn", mutates_args=())
def _flashrnn(Wx: Tensor, R: Tensor, b: Tensor, start: Tensor, function: str, fused: bool) -> Tensor:
    """Wx [T, N, B, G, D], R [N, D_in, G, D_out], b [N, G, D], start [S, N, B, D] -> [S, 1 + T, N, B, D], start first."""
    if fused:
        from tersor.kernels import flashrnn_triton

        return flashrnn_triton.forward(Wx, R, b, start, function)
    return in_torch(Wx, R, b, start, function)


def in_torch(Wx: Tensor, R: Tensor, b: Tensor, start: Tensor, function: str) -> Tensor:
    cell, (T, N, B, _, D) = CELLS[function], Wx.shape
    after = start.new_empty(len(start), 1 + T, N, B, D)
    after[:, 0] = start
    R = R.flatten(2)  # [N, D_in, G D_out]
    gates = with_input(Wx, b, cell)
    for t in range(T):
        gates[t, :, :, cell.recurrents] += torch.bmm(after[0, t], R).view(N, B, -1, D)
        after[:, t + 1] = update(function, gates[t], after[:, t])
    return after


@_flashrnn.register_fake
def _(Wx: Tensor, R: Tensor, b: Tensor, start: Tensor, function: str, fused: bool) -> Tensor:
    T, N, B, _, D = Wx.shape
    return start.new_empty(len(start), 1 + T, N, B, D)


@torch.library.custom_op("tersor::flashrnn_backward", mutates_args=())
def _flashrnn_backward(
    grad: Tensor, Wx: Tensor, R: Tensor, b: Tensor, after: Tensor, function: str, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Wx, R, b and start from `grad`, that of `after`."""
    cell = CELLS[function]
    h = after[0, :-1]
    gates = with_input(Wx, b, cell)
    gates[..., cell.recurrents, :] += torch.einsum("tnbi,nigo->tnbgo", h, R)
    walk = walk_back
    if fused:
        from tersor.kernels import flashrnn_triton

        walk = flashrnn_triton.walk_back
    d_gates, d_start = walk(grad, R, after, gates, function)
    d_R = torch.einsum("tnbi,tnbgo->nigo", h, d_gates[..., cell.recurrents, :])
    return d_gates[..., cell.inputs, :].contiguous(), d_R.contiguous(), d_gates.sum((0, 2)), d_start


def walk_back(grad: Tensor, R: Tensor, after: Tensor, gates: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """The serial part of the backward pass: gradients of all gates [T, N, B, G, D] and of the start [S, N, B, D]."""
    cell = CELLS[function]
    R_t = R.flatten(2).transpose(1, 2)  # [N, G D_out, D_in]
    d_gates, carry = torch.empty_like(gates), torch.zeros_like(grad[:, 0])
    for t in reversed(range(len(gates))):
        d_gates[t], carry = update_backward(function, gates[t], after[:, t], after[:, t + 1], grad[:, t + 1] + carry)
        carry[0] += torch.bmm(d_gates[t, :, :, cell.recurrents].flatten(2), R_t)
    return d_gates, carry + grad[:, 0]


@_flashrnn_backward.register_fake
def _(
    grad: Tensor, Wx: Tensor, R: Tensor, b: Tensor, after: Tensor, function: str, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(Wx), torch.empty_like(R), torch.empty_like(b), torch.empty_like(after[:, 0])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    Wx, R, b, _, ctx.function, ctx.fused = inputs
    ctx.save_for_backward(Wx, R, b, output)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return *_flashrnn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.function, ctx.fused), None, None


_flashrnn.register_autograd(_backward, setup_context=_setup_context)
