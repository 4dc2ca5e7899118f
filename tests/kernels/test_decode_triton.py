"""The kernels of a decoder's step against plain torch, under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.triton_interpreter import run_interpreted
from torch import Tensor

# bfloat16 scores would go through the interpreter's matmul as integers, hence float16 and float32 there.
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=DTYPES[dtype], atol=DTYPES[dtype])


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def check_add_norm(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    for dtype in dtypes:
        for rows, size in ((1, 64), (3, 100), (2, 2048), (1, 5000)):
            x, weight = normal(rows, size, dtype=dtype, device=device), normal(size, dtype=dtype, device=device)
            residual, bias = normal(rows, size, device=device), normal(size, device=device)
            for added in (None, bias):
                inside = residual.clone()
                y = decode_triton.add_norm(x, inside, weight, eps=0.1, bias=added, early=early)
                expected = residual.double() + x.double() + (0 if added is None else added.double())
                close(inside, expected, torch.float32)
                assert y.dtype == dtype
                close(y, normed(expected, weight.double(), 0.1), dtype)
            table, ids = normal(7, size, dtype=dtype, device=device), torch.randint(7, (rows,), device=device)
            inside = torch.full_like(residual, float("nan"))  # whatever it was
            y = decode_triton.add_norm(table, inside, weight, eps=0.1, ids=ids, early=early)
            close(inside, table[ids], torch.float32)
            close(y, normed(table[ids].double(), weight.double(), 0.1), dtype)


def check_rope(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    kinds = ((4, 4, 16), (8, 2, 64), (8, 1, 80), (14, 2, 24))
    for dtype in dtypes:
        for heads, kv_heads, width in kinds:
            for batch, tokens, start in ((1, 1, 0), (3, 1, 8), (2, 4, 5)):
                for joined, extras in ((True, False), (False, True)):
                    check_one_rope(decode_triton, device, early, dtype, (heads, kv_heads, width), (batch, tokens, start),
                                   joined, extras)  # fmt: skip


def check_one_rope(
    kernels,
    device,
    early,
    dtype,
    kind,
    place,
    joined: bool,
    extras: bool,  # type: ignore[no-untyped-def]
) -> None:
    (heads, kv_heads, width), (batch, tokens, start), capacity = kind, place, 9
    widths, rows = [heads * width, kv_heads * width, kv_heads * width], batch * tokens
    qkv = normal(rows, sum(widths), dtype=dtype, device=device)
    parts = qkv.split(widths, dim=1) if joined else [each.contiguous() for each in qkv.split(widths, dim=1)]
    bias = normal(sum(widths), device=device) if extras else None
    q_norm, k_norm = (normal(width, dtype=dtype, device=device) if extras else None for _ in range(2))
    angles = torch.rand(capacity, width // 2, device=device) * 6
    cos, sin = angles.cos() * 1.2, angles.sin() * 1.2  # yarn's are longer than 1
    cache = [torch.full((batch, kv_heads, capacity, width), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    position = torch.tensor([start], device=device)
    turned = kernels.rope(
        *parts, *cache, cos, sin, position, tokens=tokens, eps=0.1, bias=bias, q_norm=q_norm, k_norm=k_norm, early=early
    )
    exact = qkv.double() + (0 if bias is None else bias.double())
    q, k, v = (each.view(batch, tokens, -1, width) for each in exact.split(widths, dim=1))
    if extras:
        q, k = normed(q, q_norm.double(), 0.1), normed(k, k_norm.double(), 0.1)
    at = slice(start, start + tokens)

    def turn(x: Tensor) -> Tensor:
        c, s = cos[at, None].double(), sin[at, None].double()
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * c - high * s, high * c + low * s], dim=-1)

    close(turned.view(batch, tokens, heads, width), turn(q), dtype)
    for held, expected in zip(cache, (turn(k), v), strict=True):
        close(held[:, :, at].transpose(1, 2), expected, dtype)
        assert int(held.isnan().sum()) == batch * kv_heads * (capacity - tokens) * width  # nothing else was written


def check_attend(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    kinds = ((4, 4, 64), (8, 2, 128), (8, 1, 80), (20, 1, 16))
    for dtype in dtypes:
        for heads, kv_heads, width in kinds:
            for position, window in (
                (0, 0),
                (1, 1),
                (63, 0),
                (64, 0),
                (150, 0),
                (199, 0),
                (150, 70),
                (199, 64),
                (5, 70),
            ):
                for splits in (1, 3, 5):
                    batch, capacity = 2, 200
                    q = normal(batch, heads, width, dtype=dtype, device=device)
                    keys, values = (normal(batch, kv_heads, capacity, width, dtype=dtype, device=device) for _ in "kv")
                    first = max(0, position + 1 - window) if window else 0
                    for held in (keys, values):  # what must not be read
                        held[:, :, position + 1 :] = float("nan")
                        held[:, :, :first] = float("nan")
                    where = torch.tensor([position], device=device)
                    y = decode_triton.attend(q, keys, values, where, splits=splits, window=window, early=early)
                    seen = slice(first, position + 1)
                    k, v = (e[:, :, seen].double().repeat_interleave(heads // kv_heads, 1) for e in (keys, values))
                    scores = torch.einsum("bhd,bhnd->bhn", q.double(), k) / math.sqrt(width)
                    close(y, torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), v), dtype)


def check_gate(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    for dtype in dtypes:
        for rows, size in ((1, 64), (3, 100), (2, 1500)):
            both = normal(rows, 2 * size, dtype=dtype, device=device) * 4
            biases = normal(2, size, device=device)
            for gates, ups in (both.split(size, dim=1), [e.contiguous() for e in both.split(size, dim=1)]):
                for gate_bias, up_bias in ((None, None), (biases[0], biases[1])):
                    y = decode_triton.gate(gates, ups, gate_bias=gate_bias, up_bias=up_bias, early=early)
                    g = gates.double() + (0 if gate_bias is None else gate_bias.double())
                    u = ups.double() + (0 if up_bias is None else up_bias.double())
                    close(y, torch.nn.functional.silu(g) * u, dtype)


def check_pick(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    for dtype in dtypes:
        for batch, vocabulary in ((1, 96), (3, 2048), (19, 5003)):
            scores = (normal(batch, vocabulary, device=device) * 3).round().to(dtype)  # many are equally large
            scores[-1, 10:] = float("-inf")
            logits = torch.empty(batch, vocabulary, device=device)
            ids = torch.full((batch,), -1, device=device)
            made, position = torch.full((batch, 8), -1, device=device), torch.tensor([4], device=device)
            decode_triton.pick(scores, logits, ids, made, position, early=early)
            expected = torch.stack([(row == row.max()).nonzero()[0, 0] for row in scores.float()])
            assert torch.equal(logits, scores.float())
            assert torch.equal(ids, expected)
            assert torch.equal(made[:, 5], expected)
            assert int((made == -1).sum()) == 7 * batch
            assert int(position) == 5
            scores[:] = float("nan")
            decode_triton.pick(scores, logits, ids, made, position, early=early)
            assert torch.equal(ids, torch.zeros_like(ids))  # a token there is


@pytest.mark.parametrize("kernel", ["add_norm", "rope", "gate", "pick"])
def test_interpreted(kernel: str) -> None:
    run_interpreted(f"from kernels import test_decode_triton\ntest_decode_triton.check_{kernel}('cpu')")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_interpreted(dtype: str) -> None:
    run_interpreted(
        f"from kernels import test_decode_triton\ntest_decode_triton.check_attend('cpu', dtypes=(torch.{dtype},))"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", [check_add_norm, check_rope, check_attend, check_gate, check_pick])
@pytest.mark.parametrize("early", [False, True])
def test_on_a_gpu(check, early: bool) -> None:  # type: ignore[no-untyped-def]
    from tersor.kernels import decode_triton

    if early and not decode_triton.launches_early(torch.device("cuda", 0)):
        pytest.skip("this GPU or Triton has no programmatic dependent launch")
    torch.manual_seed(0)
    check("cuda", early, (torch.float16, torch.bfloat16))


def test_splits_fill_the_machine_and_are_no_shorter_than_a_block() -> None:
    pytest.importorskip("triton")
    from tersor.kernels.decode_triton import splits_for

    assert splits_for(1, 8, 256, 132) == 4
    assert splits_for(1, 8, 100_000, 132) == 33
    assert splits_for(32, 8, 100_000, 132) == 1
    assert splits_for(64, 32, 10, 132) == 1
