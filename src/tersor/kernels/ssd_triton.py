"""The state-space dual on GPUs: three kernels over chunks of 64 tokens, in the notation of ssd.py.

1. what each chunk adds to the state, all chunks at once     gained = sum_s exp(a_end - a_s) X_s B_sᵀ
2. the state before each chunk, one chunk after another      S' = exp(a_end) S + gained
3. each chunk's outputs, all chunks at once                  Y = (C Bᵀ ∘ decay) X + exp(a) C Sᵀ

The matmuls take x, B and C in their own dtype (bf16 on tensor cores) and add up in float32; states stay float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """As the op `tersor::ssd`: y [b, l, h, p] in dt's dtype and the last state [b, h, p, n]."""
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    chunks = triton.cdiv(length, CHUNK)
    x, B, C = x.contiguous(), B.to(x.dtype).contiguous(), C.to(x.dtype).contiguous()
    dt = F.pad(dt, (0, 0, 0, chunks * CHUNK - length))  # dt = 0 behind the end: nothing added, nothing forgotten
    dt = dt.transpose(1, 2).contiguous().view(batch, heads, chunks, CHUNK)
    a = (dt * A[:, None, None]).cumsum(-1)
    y = torch.empty(x.shape, dtype=dt.dtype, device=x.device)
    gained = dt.new_empty(batch, heads, chunks, p, n)
    before, last = torch.empty_like(gained), torch.empty_like(initial_state)

    sizes = {"P": p, "N": n, "CHUNK": CHUNK}
    tiles = {"BLOCK_P": max(16, triton.next_power_of_2(p)), "BLOCK_N": max(16, triton.next_power_of_2(n))}
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    every_chunk = (chunks, heads, batch)
    _gain[every_chunk](x, dt, a, B, gained, length, groups, **sizes, **tiles, PRECISION=precision)
    _pass_on[(triton.cdiv(p * n, 256), batch * heads)](
        a, gained, initial_state.contiguous(), before, last, chunks, PN=p * n, CHUNK=CHUNK, BLOCK=256
    )
    _output[every_chunk](x, dt, a, B, C, before, y, length, groups, **sizes, **tiles, PRECISION=precision)
    return y, last


@triton.jit  # type: ignore[untyped-decorator]
def _gain(
    x_pointer: tl.tensor,  # [b, l, h, p]
    dt_pointer: tl.tensor,  # [b, h, c, CHUNK], as a
    a_pointer: tl.tensor,
    B_pointer: tl.tensor,  # [b, l, g, n]
    gained_pointer: tl.tensor,  # [b, h, c, p, n]
    length: tl.tensor,
    groups: tl.tensor,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    place = (batch * heads + head) * chunks + chunk
    tokens, ps, ns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x_place = ((batch * length + tokens) * heads + head)[None, :] * P + ps[:, None]
    x = tl.load(x_pointer + x_place, mask=(tokens < length)[None, :] & (ps < P)[:, None], other=0.0)  # [p, l]
    B_place = ((batch * length + tokens) * groups + head // (heads // groups))[:, None] * N + ns[None, :]
    B = tl.load(B_pointer + B_place, mask=(tokens < length)[:, None] & (ns < N)[None, :], other=0.0)  # [l, n]
    inside = place * CHUNK + tl.arange(0, CHUNK)
    a = tl.load(a_pointer + inside)
    a_end = tl.load(a_pointer + place * CHUNK + CHUNK - 1)
    weight = tl.exp(a_end - a) * tl.load(dt_pointer + inside)
    X = (x * weight[None, :]).to(x.dtype)
    gained = tl.dot(X, B, input_precision=PRECISION)
    out = place * P * N + ps[:, None] * N + ns[None, :]
    tl.store(gained_pointer + out, gained, mask=(ps < P)[:, None] & (ns < N)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _pass_on(
    a_pointer: tl.tensor,  # [b, h, c, CHUNK]
    gained_pointer: tl.tensor,  # [b, h, c, p, n], as before
    initial_pointer: tl.tensor,  # [b, h, p, n], as last
    before_pointer: tl.tensor,
    last_pointer: tl.tensor,
    chunks: tl.tensor,
    PN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)  # batch * heads + head
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_number = numbers < PN
    S = tl.load(initial_pointer + row * PN + numbers, mask=is_number, other=0.0)
    for chunk in range(chunks):
        place = row * chunks + chunk
        tl.store(before_pointer + place * PN + numbers, S, mask=is_number)
        a_end = tl.load(a_pointer + place * CHUNK + CHUNK - 1)
        S = tl.exp(a_end) * S + tl.load(gained_pointer + place * PN + numbers, mask=is_number, other=0.0)
    tl.store(last_pointer + row * PN + numbers, S, mask=is_number)


@triton.jit  # type: ignore[untyped-decorator]
def _output(
    x_pointer: tl.tensor,  # [b, l, h, p], as y
    dt_pointer: tl.tensor,  # [b, h, c, CHUNK], as a
    a_pointer: tl.tensor,
    B_pointer: tl.tensor,  # [b, l, g, n], as C
    C_pointer: tl.tensor,
    before_pointer: tl.tensor,  # [b, h, c, p, n]
    y_pointer: tl.tensor,
    length: tl.tensor,
    groups: tl.tensor,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    place = (batch * heads + head) * chunks + chunk
    steps, ps, ns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    tokens = chunk * CHUNK + steps
    is_token, is_p, is_n = tokens < length, ps < P, ns < N
    x_place = ((batch * length + tokens) * heads + head)[:, None] * P + ps[None, :]
    is_x = is_token[:, None] & is_p[None, :]
    BC_place = ((batch * length + tokens) * groups + head // (heads // groups))[:, None] * N + ns[None, :]
    is_BC = is_token[:, None] & is_n[None, :]
    C = tl.load(C_pointer + BC_place, mask=is_BC, other=0.0)  # [l, n]
    a = tl.load(a_pointer + place * CHUNK + steps)

    S_place = place * P * N + ps[None, :] * N + ns[:, None]
    S = tl.load(before_pointer + S_place, mask=is_p[None, :] & is_n[:, None], other=0.0)  # [n, p]
    y = tl.dot(C, S.to(C.dtype), input_precision=PRECISION) * tl.exp(a)[:, None]

    B = tl.load(B_pointer + BC_place, mask=is_BC, other=0.0)  # [s, n]
    x = tl.load(x_pointer + x_place, mask=is_x, other=0.0)  # [s, p]
    dt = tl.load(dt_pointer + place * CHUNK + steps)
    past = steps[:, None] >= steps[None, :]
    decay = tl.exp(tl.where(past, a[:, None] - a[None, :], -float("inf")))
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay * dt[None, :]
    y += tl.dot(scores.to(x.dtype), x, input_precision=PRECISION)
    tl.store(y_pointer + x_place, y, mask=is_x)
