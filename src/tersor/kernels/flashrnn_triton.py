"""Recurrent networks on GPUs: fused, one launch a sequence, where R fits on chip; else alternating.

Fused: a program holds the R of one head in shared memory and the states of a few sequences in registers, and walks over the
steps; nothing but the gates' input part is read and nothing but the states is written at a step. Backward likewise with
R^T. `tiling` says by integer constraints whether that fits, and with which tile of the batch and how many warps.
Alternating: a step is one batched product and one kernel for everything pointwise, at any width.

Both use the same two functions for a cell: `_next` and `_back`. Products of float32 are made of three TF32 products.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.constrint import ValueRefinement, parse_expression, solve_constrint
from tersor.kernels.flashrnn_cells import CELLS, with_input

BLOCK = 1024  # elements per program of a pointwise kernel

# In shared memory: R and the tile's h, each as the two parts of a float32 that TF32 products take. All programs at once
# where a tile of 16 allows it; a warp has room for 256 numbers of each state and gate.
FITS = """
WIDTH == {width}; GATES == {gates}; BATCH == {batch}; HEADS == {heads};
8 * GATES * WIDTH ^ 2 + 8 * TILE * WIDTH <= {shared};
TILE * WIDTH <= 256 * WARPS; WARPS == [4, 8];
TILE == [16, 32]; BATCH <= TILE * TILES; TILES * HEADS <= {processors} | TILE == 32;
"""
H200 = (232448, 132)  # bytes of shared memory a program may have, and multiprocessors


@lru_cache(maxsize=256)
def tiling(width: int, gates: int, batch: int, heads: int, limits: tuple[int, int] = H200) -> dict[str, int] | None:
    """TILE (sequences a program) and WARPS of the fused form, the smallest that fit, or None where R does not."""
    width, (shared, processors) = max(16, triton.next_power_of_2(width)), limits
    text = FITS.format(width=width, gates=gates, batch=batch, heads=heads, shared=shared, processors=processors)
    solutions = solve_constrint(*parse_expression(text), [ValueRefinement("TILE"), ValueRefinement("WARPS")])
    return solutions[0] if solutions else None


@lru_cache(maxsize=16)
def _limits(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":  # the interpreter
        return H200
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return found["max_shared_mem"], found["multiprocessor_count"]


def forward(Wx: Tensor, R: Tensor, b: Tensor, start: Tensor, function: str) -> Tensor:
    """As the op `tersor::flashrnn`."""
    cell, (T, N, B, _, D) = CELLS[function], Wx.shape
    after = start.new_empty(len(start), 1 + T, N, B, D)
    after[:, 0] = start
    fresh = _fresh(start, function)
    tiles = tiling(D, cell.recurrent_gates, B, N, _limits(R.device))
    if tiles is None:
        gates, R = with_input(Wx, b, cell), R.flatten(2)
        for t in range(T):
            gates[t, :, :, cell.recurrents] += torch.bmm(after[0, t], R).view(N, B, -1, D)
            _next_states[(triton.cdiv(N * B * D, BLOCK),)](
                gates, after, fresh, t, T, N * B * D, D, GATES=cell.gates, CELL=function, BLOCK=BLOCK
            )
        return after
    _forward[(triton.cdiv(B, tiles["TILE"]), N)](
        Wx.contiguous(), R.contiguous(), b.contiguous(), after, fresh, T, B, D, CELL=function, INPUTS=cell.input_gates,
        RECURRENT=cell.recurrent_gates, GATES=cell.gates, TILE=tiles["TILE"], WIDTH=max(16, triton.next_power_of_2(D)),
        num_warps=tiles["WARPS"], num_stages=1,
    )  # fmt: skip
    return after


def walk_back(grad: Tensor, R: Tensor, after: Tensor, gates: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """As `walk_back` in flashrnn.py: gradients of all gates and of the start."""
    cell, (T, N, B, _, D) = CELLS[function], gates.shape
    grad, gates, fresh = grad.contiguous(), gates.contiguous(), _fresh(after[:, 0], function)
    d_gates = torch.empty_like(gates)
    carry = grad.new_zeros(len(grad), N, B, D)
    tiles = tiling(D, cell.recurrent_gates, B, N, _limits(R.device))
    if tiles is None:
        R_t = R.flatten(2).transpose(1, 2)  # [N, G D_out, D_in]
        for t in reversed(range(T)):
            _previous_gradients[(triton.cdiv(N * B * D, BLOCK),)](
                gates, after, grad, d_gates, carry, fresh, t, T, N * B * D, D,
                GATES=cell.gates, CELL=function, BLOCK=BLOCK,
            )  # fmt: skip
            carry[0] += torch.bmm(d_gates[t, :, :, cell.recurrents].flatten(2), R_t)
    else:
        _backward[(triton.cdiv(B, tiles["TILE"]), N)](
            gates, R.contiguous(), after, grad, d_gates, carry, fresh, T, B, D, CELL=function,
            RECURRENT=cell.recurrent_gates, GATES=cell.gates, TILE=tiles["TILE"],
            WIDTH=max(16, triton.next_power_of_2(D)), num_warps=tiles["WARPS"], num_stages=1,
        )  # fmt: skip
    return d_gates, carry + grad[:, 0]


def _fresh(start: Tensor, function: str) -> Tensor:
    """int32 on the device: an sLSTM whose n is all zero. After the first step n is at least 1."""
    return (start[2 if function == "slstm" else 0] == 0).all().to(torch.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x: tl.tensor) -> tl.tensor:
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit  # type: ignore[untyped-decorator]
def _log_sigmoid(x: tl.tensor) -> tl.tensor:
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit  # type: ignore[untyped-decorator]
def _next(
    a0: tl.tensor,  # the gates, in the cell's order; those that it has not are anything
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    h: tl.tensor,
    c: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    first: tl.tensor,  # an sLSTM at its start
    CELL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    if CELL == "elman":
        h = _tanh(a0)
    if CELL == "gru":
        z = tl.sigmoid(a2)
        h = z * h + (1 - z) * _tanh(a3 + tl.sigmoid(a1) * a0)
    if CELL == "lstm":
        c = tl.sigmoid(a1) * c + tl.sigmoid(a0) * _tanh(a2)
        h = tl.sigmoid(a3) * _tanh(c)
    if CELL == "slstm":
        kept = _log_sigmoid(a1) + m
        m = tl.where(first, a0, tl.maximum(a0, kept))
        new = tl.exp(a0 - m)
        old = tl.exp(kept - m)
        c = old * c + new * _tanh(a2)
        n = tl.maximum(old * n + new, 1.0)
        h = tl.sigmoid(a3) * c / n
    return h, c, n, m


@triton.jit  # type: ignore[untyped-decorator]
def _back(
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    h: tl.tensor,  # the states before
    c: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    h_after: tl.tensor,
    c_after: tl.tensor,
    n_after: tl.tensor,
    m_after: tl.tensor,
    d_h: tl.tensor,  # the gradients of those after
    d_c: tl.tensor,
    d_n: tl.tensor,
    d_m: tl.tensor,
    first: tl.tensor,
    CELL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Gradients of the gates and of the states before; that of h without the part through R."""
    g0, g1, g2, g3 = d_h, d_h, d_h, d_h
    if CELL == "elman":
        g0 = (1 - h_after * h_after) * d_h
        d_h = 0.0 * d_h
    if CELL == "gru":
        r = tl.sigmoid(a1)
        z = tl.sigmoid(a2)
        u = _tanh(a3 + r * a0)
        g3 = (1 - z) * (1 - u * u) * d_h
        g0 = r * g3
        g1 = a0 * r * (1 - r) * g3
        g2 = (h - u) * z * (1 - z) * d_h
        d_h = z * d_h
    if CELL == "lstm":
        i = tl.sigmoid(a0)
        f = tl.sigmoid(a1)
        z = _tanh(a2)
        o = tl.sigmoid(a3)
        squashed = _tanh(c_after)
        g3 = d_h * squashed * o * (1 - o)
        d_c += d_h * o * (1 - squashed * squashed)
        g0 = d_c * z * i * (1 - i)
        g1 = d_c * c * f * (1 - f)
        g2 = d_c * i * (1 - z * z)
        d_c *= f
        d_h = 0.0 * d_h
    if CELL == "slstm":
        z = _tanh(a2)
        o = tl.sigmoid(a3)
        kept = _log_sigmoid(a1) + m
        new = tl.exp(a0 - m_after)
        old = tl.exp(kept - m_after)
        d_c += d_h * o / n_after
        d_n -= d_h * o * c_after / (n_after * n_after)
        d_n = tl.where(old * n + new >= 1, d_n, 0.0)
        d_new = (d_c * z + d_n) * new
        d_old = (d_c * c + d_n * n) * old
        d_m = d_m - d_new - d_old
        by_input = first | (a0 >= kept)
        d_kept = d_old + tl.where(by_input, 0.0, d_m)
        g0 = d_new + tl.where(by_input, d_m, 0.0)
        g1 = d_kept * tl.sigmoid(-a1)
        g2 = d_c * new * (1 - z * z)
        g3 = d_h * c_after / n_after * o * (1 - o)
        d_c *= old
        d_n *= old
        d_m = d_kept
        d_h = 0.0 * d_h
    return g0, g1, g2, g3, d_h, d_c, d_n, d_m


@triton.jit  # type: ignore[untyped-decorator]
def _load_states(
    pointer: tl.tensor, stride: tl.tensor, mask: tl.tensor, CELL: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """h, c, n, m; those that the cell has not are h."""
    h = tl.load(pointer, mask=mask, other=0.0)
    c, n, m = h, h, h
    if CELL == "lstm" or CELL == "slstm":
        c = tl.load(pointer + stride, mask=mask, other=0.0)
    if CELL == "slstm":
        n = tl.load(pointer + 2 * stride, mask=mask, other=1.0)
        m = tl.load(pointer + 3 * stride, mask=mask, other=0.0)
    return h, c, n, m


@triton.jit  # type: ignore[untyped-decorator]
def _store_states(
    pointer: tl.tensor,
    stride: tl.tensor,
    h: tl.tensor,
    c: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    mask: tl.tensor,
    CELL: tl.constexpr,
) -> None:
    tl.store(pointer, h, mask=mask)
    if CELL == "lstm" or CELL == "slstm":
        tl.store(pointer + stride, c, mask=mask)
    if CELL == "slstm":
        tl.store(pointer + 2 * stride, n, mask=mask)
        tl.store(pointer + 3 * stride, m, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load_gates(
    pointer: tl.tensor, D: tl.tensor, mask: tl.tensor, GATES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    a0 = tl.load(pointer, mask=mask, other=0.0)
    a1, a2, a3 = a0, a0, a0
    if GATES > 1:
        a1 = tl.load(pointer + D, mask=mask, other=0.0)
        a2 = tl.load(pointer + 2 * D, mask=mask, other=0.0)
    if GATES > 3:
        a3 = tl.load(pointer + 3 * D, mask=mask, other=0.0)
    return a0, a1, a2, a3


@triton.jit  # type: ignore[untyped-decorator]
def _store_gates(
    pointer: tl.tensor,
    D: tl.tensor,
    g0: tl.tensor,
    g1: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    mask: tl.tensor,
    GATES: tl.constexpr,
) -> None:
    tl.store(pointer, g0, mask=mask)
    if GATES > 1:
        tl.store(pointer + D, g1, mask=mask)
        tl.store(pointer + 2 * D, g2, mask=mask)
        tl.store(pointer + 3 * D, g3, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(x: tl.tensor, R: tl.tensor) -> tl.tensor:
    return tl.dot(x, R, input_precision="tf32x3")


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _forward(
    Wx_pointer: tl.tensor,  # [T, N, B, INPUTS, D]
    R_pointer: tl.tensor,  # [N, D, RECURRENT, D]
    b_pointer: tl.tensor,  # [N, GATES, D]
    after_pointer: tl.tensor,  # [S, 1 + T, N, B, D], the first of 1 + T given
    fresh_pointer: tl.tensor,
    T: tl.tensor,
    B: tl.tensor,
    D: tl.tensor,
    CELL: tl.constexpr,
    INPUTS: tl.constexpr,
    RECURRENT: tl.constexpr,
    GATES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, WIDTH)
    mask = (rows < B)[:, None] & (columns < D)[None, :]
    square = (columns < D)[:, None] & (columns < D)[None, :]
    within = rows[:, None] * D + columns[None, :]
    of_input = rows[:, None] * INPUTS * D + columns[None, :]
    stride = tl.cast(T + 1, tl.int64) * heads * B * D  # between states
    block = R_pointer + head * D * RECURRENT * D + columns[:, None] * RECURRENT * D + columns[None, :]
    R0, R1, R2, R3 = _load_gates(block, D, square, RECURRENT)
    b0, b1, b2, b3 = _load_gates(b_pointer + head * GATES * D + columns, D, columns < D, GATES)
    h, c, n, m = _load_states(after_pointer + head * B * D + within, stride, mask, CELL)
    fresh = tl.load(fresh_pointer) != 0
    for t in range(T):
        a0, a1, a2, a3 = _load_gates(Wx_pointer + (t * heads + head) * B * INPUTS * D + of_input, D, mask, INPUTS)
        if CELL == "gru":
            a3 = a2 + b3[None, :]
            a2 = a1 + _dot(h, R2) + b2[None, :]
            a1 = a0 + _dot(h, R1) + b1[None, :]
            a0 = _dot(h, R0) + b0[None, :]
        else:
            a0 += _dot(h, R0) + b0[None, :]
        if CELL == "lstm" or CELL == "slstm":
            a1 += _dot(h, R1) + b1[None, :]
            a2 += _dot(h, R2) + b2[None, :]
            a3 += _dot(h, R3) + b3[None, :]
        h, c, n, m = _next(a0, a1, a2, a3, h, c, n, m, fresh & (t == 0), CELL)
        place = after_pointer + ((t + 1) * heads + head) * B * D + within
        _store_states(place, stride, h, c, n, m, mask, CELL)


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _backward(
    gates_pointer: tl.tensor,  # [T, N, B, GATES, D], as d_gates
    R_pointer: tl.tensor,  # [N, D, RECURRENT, D]
    after_pointer: tl.tensor,  # [S, 1 + T, N, B, D], as grad
    grad_pointer: tl.tensor,
    d_gates_pointer: tl.tensor,
    carry_pointer: tl.tensor,  # [S, N, B, D]
    fresh_pointer: tl.tensor,
    T: tl.tensor,
    B: tl.tensor,
    D: tl.tensor,
    CELL: tl.constexpr,
    RECURRENT: tl.constexpr,
    GATES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, WIDTH)
    mask = (rows < B)[:, None] & (columns < D)[None, :]
    square = (columns < D)[:, None] & (columns < D)[None, :]
    within = rows[:, None] * D + columns[None, :]
    of_gates = rows[:, None] * GATES * D + columns[None, :]
    stride = tl.cast(T + 1, tl.int64) * heads * B * D
    block = R_pointer + head * D * RECURRENT * D + columns[None, :] * RECURRENT * D + columns[:, None]  # [D_out, D_in]
    R0, R1, R2, R3 = _load_gates(block, D, square, RECURRENT)
    fresh = tl.load(fresh_pointer) != 0
    d_h = tl.zeros((TILE, WIDTH), tl.float32)
    d_c, d_n, d_m = d_h, d_h, d_h
    for back in range(T):
        t = T - 1 - back
        a0, a1, a2, a3 = _load_gates(gates_pointer + (t * heads + head) * B * GATES * D + of_gates, D, mask, GATES)
        before = (t * heads + head) * B * D + within
        behind = before + heads * B * D
        h, c, n, m = _load_states(after_pointer + before, stride, mask, CELL)
        h_after, c_after, n_after, m_after = _load_states(after_pointer + behind, stride, mask, CELL)
        e_h, e_c, e_n, e_m = _load_states(grad_pointer + behind, stride, mask, CELL)
        g0, g1, g2, g3, d_h, d_c, d_n, d_m = _back(
            a0, a1, a2, a3, h, c, n, m, h_after, c_after, n_after, m_after,
            d_h + e_h, d_c + e_c, d_n + e_n, d_m + e_m, fresh & (t == 0), CELL,
        )  # fmt: skip
        place = d_gates_pointer + (t * heads + head) * B * GATES * D + of_gates
        _store_gates(place, D, g0, g1, g2, g3, mask, GATES)
        d_h += _dot(tl.where(mask, g0, 0.0), R0)
        if RECURRENT > 1:
            d_h += _dot(tl.where(mask, g1, 0.0), R1)
            d_h += _dot(tl.where(mask, g2, 0.0), R2)
        if RECURRENT > 3:
            d_h += _dot(tl.where(mask, g3, 0.0), R3)
    first_stride = heads.to(tl.int64) * B * D
    _store_states(carry_pointer + head * B * D + within, first_stride, d_h, d_c, d_n, d_m, mask, CELL)


@triton.jit(do_not_specialize=["t", "T"])  # type: ignore[untyped-decorator]
def _next_states(
    gates_pointer: tl.tensor,  # [T, N, B, GATES, D]
    after_pointer: tl.tensor,  # [S, 1 + T, N, B, D]
    fresh_pointer: tl.tensor,
    t: tl.tensor,
    T: tl.tensor,
    size: tl.tensor,  # N B D
    D: tl.tensor,
    GATES: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at, stride = tl.cast(t, tl.int64) * size, tl.cast(T + 1, tl.int64) * size
    gates = gates_pointer + at * GATES + element // D * GATES * D + element % D
    a0, a1, a2, a3 = _load_gates(gates, D, mask, GATES)
    h, c, n, m = _load_states(after_pointer + at + element, stride, mask, CELL)
    first = (tl.load(fresh_pointer) != 0) & (t == 0)
    h, c, n, m = _next(a0, a1, a2, a3, h, c, n, m, first, CELL)
    _store_states(after_pointer + at + size + element, stride, h, c, n, m, mask, CELL)


@triton.jit(do_not_specialize=["t", "T"])  # type: ignore[untyped-decorator]
def _previous_gradients(
    gates_pointer: tl.tensor,  # [T, N, B, GATES, D], as d_gates
    after_pointer: tl.tensor,  # [S, 1 + T, N, B, D], as grad
    grad_pointer: tl.tensor,
    d_gates_pointer: tl.tensor,
    carry_pointer: tl.tensor,  # [S, N, B, D], in place
    fresh_pointer: tl.tensor,
    t: tl.tensor,
    T: tl.tensor,
    size: tl.tensor,  # N B D
    D: tl.tensor,
    GATES: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at, stride = tl.cast(t, tl.int64) * size, tl.cast(T + 1, tl.int64) * size
    of_gates = at * GATES + element // D * GATES * D + element % D
    a0, a1, a2, a3 = _load_gates(gates_pointer + of_gates, D, mask, GATES)
    before = at + element
    h, c, n, m = _load_states(after_pointer + before, stride, mask, CELL)
    h_after, c_after, n_after, m_after = _load_states(after_pointer + before + size, stride, mask, CELL)
    e_h, e_c, e_n, e_m = _load_states(grad_pointer + before + size, stride, mask, CELL)
    d_h, d_c, d_n, d_m = _load_states(carry_pointer + element, size, mask, CELL)
    g0, g1, g2, g3, d_h, d_c, d_n, d_m = _back(
        a0, a1, a2, a3, h, c, n, m, h_after, c_after, n_after, m_after,
        d_h + e_h, d_c + e_c, d_n + e_n, d_m + e_m, (tl.load(fresh_pointer) != 0) & (t == 0), CELL,
    )  # fmt: skip
    _store_gates(d_gates_pointer + of_gates, D, g0, g1, g2, g3, mask, GATES)
    _store_states(carry_pointer + element, size, d_h, d_c, d_n, d_m, mask, CELL)
