"""The selective scan on GPUs: one program holds the state of a few channels in registers and walks over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 16  # channels per program; small, as the walk is serial and only other programs hide its latency


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op `tersor::selective_scan`: y, the last state, and the state before each chunk."""
    x, dt, A, B, C, initial_state = (each.contiguous() for each in (x, dt, A, B, C, initial_state))
    batch, length, d = x.shape
    n = A.shape[1]
    y, last = torch.empty_like(x), torch.empty_like(initial_state)
    before = initial_state.new_empty(triton.cdiv(length, chunk_size), *initial_state.shape)
    _scan[(triton.cdiv(d, BLOCK_D), batch)](
        x, dt, A, B, C, initial_state, y, last, before, length, d, n, chunk_size,
        BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(n), num_warps=1,
    )  # fmt: skip
    return y, last, before


@triton.jit  # type: ignore[untyped-decorator]
def _scan(
    x_pointer: tl.tensor,  # [b, l, d], as dt and y
    dt_pointer: tl.tensor,
    A_pointer: tl.tensor,  # [d, n]
    B_pointer: tl.tensor,  # [b, l, n], as C
    C_pointer: tl.tensor,
    initial_pointer: tl.tensor,  # [b, d, n], as last
    y_pointer: tl.tensor,
    last_pointer: tl.tensor,
    before_pointer: tl.tensor,  # [chunks, b, d, n]
    length: tl.tensor,
    d: tl.tensor,
    n: tl.tensor,
    chunk_size: tl.tensor,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    batch = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    numbers = tl.arange(0, BLOCK_N)
    is_channel, is_number = channels < d, numbers < n
    is_state = is_channel[:, None] & is_number[None, :]
    within = channels[:, None] * n + numbers[None, :]

    A = tl.load(A_pointer + within, mask=is_state, other=0.0)
    h = tl.load(initial_pointer + batch * d * n + within, mask=is_state, other=0.0)
    tokens = batch * length
    for t in range(length):
        if t % chunk_size == 0:
            chunk = (t // chunk_size) * tl.num_programs(1) + batch
            tl.store(before_pointer + chunk * d * n + within, h, mask=is_state)
        row = (tokens + t) * d + channels
        x = tl.load(x_pointer + row, mask=is_channel, other=0.0)
        dt = tl.load(dt_pointer + row, mask=is_channel, other=0.0)
        B = tl.load(B_pointer + (tokens + t) * n + numbers, mask=is_number, other=0.0)
        C = tl.load(C_pointer + (tokens + t) * n + numbers, mask=is_number, other=0.0)
        h = tl.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        tl.store(y_pointer + row, tl.sum(h * C[None, :], 1), mask=is_channel)
    tl.store(last_pointer + batch * d * n + within, h, mask=is_state)
