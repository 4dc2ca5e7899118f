"""The parts of a LLaMA decoder between its matmuls, in few kernels: at one token the launches take the time, not the bytes.

    add_norm     residual += x;  y = rms_norm(residual)                     (or residual = embedding[ids] to begin with)
    rope         bias, norm of queries and keys, rotary positions; keys and values go to their places in the cache
    attend       one query position against the cache, cut along the positions so that few sequences fill the machine
    gate         silu(gate) * up
    pick         the likeliest token, which becomes the next one on the device

Arithmetic and the residual stream are in float32; the input of a matmul is rounded once, to its type. All take `early`.

**Early launch** (programmatic dependent launch, from compute capability 9.0 on; `launches_early`). Every kernel here lets the
next one start at once (`gdc_launch_dependents` comes first), and so do `quantized_matmul.cu` and `llama_step.cu`, which fetch
their weights while the kernels ahead of them still run. It is sound because every kernel of the chain keeps one rule: before
its `gdc_wait` (there: `griddepcontrol.wait` of the threads that touch anything but weights) a thread block neither ends nor
reads or writes anything that any kernel of the chain writes. The wait lasts until the whole kernel before has ended and its
writes can be seen. That one ended after its own wait, hence after the end of the one before it, and so on: behind its wait a
kernel has all of the past to itself, however many kernels were started ahead. So it may also write where an earlier kernel
read, and the allocator may use memory again. Only constants are read before the wait: norm weights here, packed weights there;
whoever writes them synchronizes. A kernel that is launched plainly (cuBLAS, torch) starts after the end of the one before and
keeps the rule by that. All this holds within a stream.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # positions of the cache at a time
ROPE_HEADS = 16  # heads of a prompt's token in one program; at one token each has its own
GATE_BLOCK = 512
PICK_BLOCK = 2048
PICK_ROWS = 16


def launches_early(device: torch.device) -> bool:
    """Whether kernels on this device can be launched before the one ahead of them has ended."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return hasattr(tl.extra.cuda, "gdc_wait") and hasattr(tl.extra.cuda, "gdc_launch_dependents")


def _launch(early: bool) -> dict[str, Any]:
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


# ------------------------------------------------------------------------------------------------ residual and norm


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """y [rows, size] = rms_norm(residual) * weight in x's dtype, after residual += x (+ bias), in place.

    x [rows, size]; residual float32 [rows, size]; weight [size]; bias [size]. With ids [rows], x is a table [tokens, size] and
    residual becomes its rows, whatever it was.
    """
    rows, size = residual.shape
    y = x.new_empty(rows, size)
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        x, weight if ids is None else ids, weight if bias is None else bias, residual, weight, y, size, eps,
        FIRST=ids is not None, BIAS=bias is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        **_launch(early),
    )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    x_pointer,
    ids_pointer,
    bias_pointer,
    residual_pointer,
    weight_pointer,
    y_pointer,
    size,
    eps,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)  # a constant: before the wait
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if FIRST:
        token = tl.load(ids_pointer + row)
        hidden = tl.load(x_pointer + token * size + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        hidden = tl.load(x_pointer + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        hidden += tl.load(residual_pointer + row * size + columns, mask=inside, other=0.0)
    if BIAS:
        hidden += tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual_pointer + row * size + columns, hidden, mask=inside)
    y = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / size + eps) * weight
    tl.store(y_pointer + row * size + columns, y.to(y_pointer.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ positions and cache


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    *,
    tokens: int,
    eps: float,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Queries [rows, heads, width], turned to their positions; keys and values go to the cache.

    q [rows, heads * width], k and v [rows, kv heads * width]: rows of any stride, `tokens` rows a sequence. keys, values
    [batch, kv heads, capacity, width], in place. cos, sin: float32 [capacity, width / 2]. position: integer [1], where
    each sequence's first row belongs. bias: [(heads + 2 kv heads) * width]. q_norm, k_norm: [width], both or none.
    """
    rows, width = q.shape[0], keys.shape[3]
    heads, kv_heads, capacity = q.shape[1] // width, keys.shape[1], keys.shape[2]
    assert (q_norm is None) == (k_norm is None)
    assert q.stride(1) == k.stride(1) == v.stride(1) == 1
    assert cos.shape[1] * 2 == width
    turned = q.new_empty(rows, heads, width)
    block_heads = 1 if tokens == 1 else ROPE_HEADS
    _rope[(rows, triton.cdiv(heads + 2 * kv_heads, block_heads))](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), cos if bias is None else bias,
        cos if q_norm is None else q_norm, cos if k_norm is None else k_norm, cos, sin, position,
        turned, keys, values, tokens, capacity, eps,
        HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, BIAS=bias is not None, NORM=q_norm is not None,
        BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(width // 2), num_warps=1 if tokens == 1 else 4,
        **_launch(early),
    )  # fmt: skip
    return turned


@triton.jit  # type: ignore[untyped-decorator]
def _rope(  # type: ignore[no-untyped-def]
    q_pointer,
    k_pointer,
    v_pointer,
    q_stride,
    k_stride,
    v_stride,
    bias_pointer,
    q_norm_pointer,
    k_norm_pointer,
    cos_pointer,
    sin_pointer,
    position_pointer,
    turned_pointer,
    keys_pointer,
    values_pointer,
    tokens,
    capacity,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_pointer).to(tl.int64) + row % tokens
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]  # those of q, of k, of v, in this order
    number = tl.arange(0, BLOCK_HALF)[None, :]
    inside = number < HALF
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)

    # Number i of a head turns with number i + width / 2.
    q_at = q_pointer + row * q_stride + head * (2 * HALF) + number
    k_at = k_pointer + row * k_stride + kv_head * (2 * HALF) + number
    v_at = v_pointer + row * v_stride + kv_head * (2 * HALF) + number
    low = tl.load(q_at, mask=is_q & inside, other=0.0).to(tl.float32)
    high = tl.load(q_at + HALF, mask=is_q & inside, other=0.0).to(tl.float32)
    low += tl.load(k_at, mask=is_k & inside, other=0.0).to(tl.float32)
    high += tl.load(k_at + HALF, mask=is_k & inside, other=0.0).to(tl.float32)
    low += tl.load(v_at, mask=is_v & inside, other=0.0).to(tl.float32)
    high += tl.load(v_at + HALF, mask=is_v & inside, other=0.0).to(tl.float32)
    if BIAS:
        bias_at = bias_pointer + head * (2 * HALF) + number
        known = (is_q | is_k | is_v) & inside
        low += tl.load(bias_at, mask=known, other=0.0).to(tl.float32)
        high += tl.load(bias_at + HALF, mask=known, other=0.0).to(tl.float32)
    if NORM:
        q_low = tl.load(q_norm_pointer + number, mask=inside, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm_pointer + HALF + number, mask=inside, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm_pointer + number, mask=inside, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm_pointer + HALF + number, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low = tl.where(is_v, low, low * scale * tl.where(is_q, q_low, k_low))
        high = tl.where(is_v, high, high * scale * tl.where(is_q, q_high, k_high))
    cos = tl.load(cos_pointer + position * HALF + number, mask=inside, other=0.0)
    sin = tl.load(sin_pointer + position * HALF + number, mask=inside, other=0.0)
    cos = tl.where(is_v, 1.0, cos)
    sin = tl.where(is_v, 0.0, sin)
    first = (low * cos - high * sin).to(turned_pointer.dtype.element_ty)
    second = (high * cos + low * sin).to(turned_pointer.dtype.element_ty)

    turned_at = turned_pointer + (row * HEADS + head) * (2 * HALF) + number
    tl.store(turned_at, first, mask=is_q & inside)
    tl.store(turned_at + HALF, second, mask=is_q & inside)
    place = ((row // tokens * KV_HEADS + kv_head) * capacity + position) * (2 * HALF) + number
    tl.store(keys_pointer + place, first, mask=is_k & inside)
    tl.store(keys_pointer + place + HALF, second, mask=is_k & inside)
    tl.store(values_pointer + place, first, mask=is_v & inside)
    tl.store(values_pointer + place + HALF, second, mask=is_v & inside)


# ------------------------------------------------------------------------------------------------ attention


def splits_for(sequences: int, kv_heads: int, capacity: int, processors: int) -> int:
    """Pieces into which the positions are cut: about two programs a processor, none shorter than a block."""
    return max(1, min(2 * processors // (sequences * kv_heads), -(-capacity // BLOCK_N)))


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    splits: int,
    window: int = 0,
    early: bool = False,
) -> Tensor:
    """softmax(q · kᵀ / √width) · v over the positions up to `position`, of the last `window` only where that is above 0.

    q [batch, heads, width], contiguous; keys, values [batch, kv heads, capacity, width]; position: integer [1].
    y [batch, heads, width]. What the cache holds beyond the position is not read.
    """
    batch, heads, width = q.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    y = torch.empty_like(q)
    pieces, maxima, totals = y, y, y
    if splits > 1:
        pieces = q.new_empty(batch * heads, splits, width, dtype=torch.float32)
        maxima, totals = q.new_empty(2, batch * heads, splits, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(width))
    _attend[(batch * kv_heads, splits)](
        q, keys, values, position, y, pieces, maxima, totals, capacity, width**-0.5 * 1.4426950408889634,
        GROUP=group, WIDTH=width, SPLITS=splits, WINDOW=window, BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d, BLOCK_N=BLOCK_N, num_warps=4, num_stages=2, **_launch(early),
    )  # fmt: skip
    if splits > 1:
        _merge[(batch * heads,)](
            pieces, maxima, totals, y, WIDTH=width, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_D=block_d, num_warps=4, **_launch(early),
        )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_pointer,
    keys_pointer,
    values_pointer,
    position_pointer,
    y_pointer,
    pieces_pointer,
    maxima_pointer,
    totals_pointer,
    capacity,
    scale,  # to powers of two
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(0).to(tl.int64)  # of sequence and key-value head, which GROUP query heads share
    split = tl.program_id(1)
    g, d, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    end = tl.load(position_pointer).to(tl.int32) + 1
    begin = tl.maximum(end - WINDOW, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK_N) * BLOCK_N
    start = begin + split * share
    stop = tl.minimum(start + share, end)

    is_q = (g < GROUP)[:, None] & (d < WIDTH)[None, :]
    q_rows = pair * GROUP + g
    q = tl.load(q_pointer + q_rows[:, None] * WIDTH + d[None, :], mask=is_q, other=0.0)
    keys = keys_pointer + pair * capacity * WIDTH
    values = values_pointer + pair * capacity * WIDTH
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for at in range(start, stop, BLOCK_N):
        places = at + n
        seen = places < stop
        k = tl.load(keys + places[None, :] * WIDTH + d[:, None], mask=seen[None, :] & (d < WIDTH)[:, None], other=0.0)
        v = tl.load(values + places[:, None] * WIDTH + d[None, :], mask=seen[:, None] & (d < WIDTH)[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))  # finite: every block has a position that is seen
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        largest = higher

    if SPLITS == 1:
        y = (sums / total[:, None]).to(y_pointer.dtype.element_ty)
        tl.store(y_pointer + q_rows[:, None] * WIDTH + d[None, :], y, mask=is_q)
    else:
        tl.store(maxima_pointer + q_rows * SPLITS + split, largest, mask=g < GROUP)  # -inf: nothing in this piece
        tl.store(totals_pointer + q_rows * SPLITS + split, total, mask=g < GROUP)
        piece = pieces_pointer + (q_rows * SPLITS + split)[:, None] * WIDTH + d[None, :]
        tl.store(piece, sums, mask=is_q & (start < stop))


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    pieces_pointer,
    maxima_pointer,
    totals_pointer,
    y_pointer,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    maxima = tl.load(maxima_pointer + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    used = maxima > float("-inf")
    share = tl.exp2(maxima - tl.max(maxima, 0))
    total = tl.sum(share * tl.load(totals_pointer + row * SPLITS + s, mask=used, other=0.0), 0)
    inside = used[:, None] & (d < WIDTH)[None, :]
    pieces = tl.load(pieces_pointer + (row * SPLITS + s)[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
    y = tl.sum(share[:, None] * pieces, 0) / total
    tl.store(y_pointer + row * WIDTH + d, y.to(y_pointer.dtype.element_ty), mask=d < WIDTH)


# ------------------------------------------------------------------------------------------------ feed-forward


def gate(
    gates: Tensor, ups: Tensor, *, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, early: bool = False
) -> Tensor:
    """y [rows, size] = silu(gates) * ups. gates, ups [rows, size]: rows of any stride. Biases [size], both or none."""
    rows, size = gates.shape
    assert (gate_bias is None) == (up_bias is None)
    assert gates.stride(1) == ups.stride(1) == 1
    y = gates.new_empty(rows, size)
    _gate[(rows, triton.cdiv(size, GATE_BLOCK))](
        gates, ups, gates.stride(0), ups.stride(0), gates if gate_bias is None else gate_bias,
        ups if up_bias is None else up_bias, y, size,
        BIAS=gate_bias is not None, BLOCK=GATE_BLOCK, num_warps=2, **_launch(early),
    )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    gates_pointer,
    ups_pointer,
    gates_stride,
    ups_stride,
    gate_bias_pointer,
    up_bias_pointer,
    y_pointer,
    size,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gates = tl.load(gates_pointer + row * gates_stride + columns, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(ups_pointer + row * ups_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        gates += tl.load(gate_bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
        ups += tl.load(up_bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    y = gates / (1.0 + tl.exp(-gates)) * ups
    tl.store(y_pointer + row * size + columns, y.to(y_pointer.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ the next token


def pick(scores: Tensor, logits: Tensor, ids: Tensor, made: Tensor, position: Tensor, *, early: bool = False) -> None:
    """logits = scores in float32; ids = the first of the largest, which `made` keeps behind the position; position += 1.

    scores [batch, vocabulary]; in place: logits float32 [batch, vocabulary], ids int64 [batch], made int64
    [batch, capacity + 1], position int64 [1].
    """
    batch, vocabulary = scores.shape
    parts = triton.cdiv(vocabulary, PICK_BLOCK)
    maxima = logits.new_empty(batch, parts)
    places = ids.new_empty(batch, parts, dtype=torch.int32)
    _largest[(batch, parts)](
        scores, logits, maxima, places, vocabulary, BLOCK=PICK_BLOCK, num_warps=4, **_launch(early)
    )
    rows = min(PICK_ROWS, triton.next_power_of_2(batch))
    _pick[(1,)](
        maxima, places, ids, made, position, batch, parts, vocabulary, made.stride(0),
        BLOCK_ROWS=rows, BLOCK=triton.next_power_of_2(parts), num_warps=4, **_launch(early),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _largest(  # type: ignore[no-untyped-def]
    scores_pointer,
    logits_pointer,
    maxima_pointer,
    places_pointer,
    vocabulary,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    scores = tl.load(scores_pointer + row * vocabulary + columns, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(logits_pointer + row * vocabulary + columns, scores, mask=inside)
    largest = tl.max(scores, 0)
    place = tl.min(tl.where(scores == largest, columns, vocabulary), 0)
    tl.store(maxima_pointer + row * tl.num_programs(1) + part, largest)
    tl.store(places_pointer + row * tl.num_programs(1) + part, place)


@triton.jit  # type: ignore[untyped-decorator]
def _pick(  # type: ignore[no-untyped-def]
    maxima_pointer,
    places_pointer,
    ids_pointer,
    made_pointer,
    position_pointer,
    batch,
    parts,
    vocabulary,
    made_stride,
    EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position = tl.load(position_pointer) + 1
    part = tl.arange(0, BLOCK)[None, :]
    for first in range(0, batch, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < batch)[:, None] & (part < parts)
        maxima = tl.load(maxima_pointer + row[:, None] * parts + part, mask=inside, other=float("-inf"))
        places = tl.load(places_pointer + row[:, None] * parts + part, mask=inside, other=0)
        token = tl.min(tl.where((maxima == tl.max(maxima, 1)[:, None]) & inside, places, vocabulary), 1)
        token = tl.where(token < vocabulary, token, 0).to(tl.int64)  # no largest: not-a-number
        tl.store(ids_pointer + row, token, mask=row < batch)
        tl.store(made_pointer + row * made_stride + position, token, mask=row < batch)
    tl.store(position_pointer, position)
