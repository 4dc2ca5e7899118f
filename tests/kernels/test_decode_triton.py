"""The kernels of a decoder's step against plain torch, under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import math
from typing import Any

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
        for rows, size in ((3, 100), (1, 2048)):
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

    kinds = ((4, 4, 16), (8, 1, 80), (14, 2, 24))  # heads, key-value heads, width
    places = ((1, 1, 0), (2, 4, 5), (3, 1, 8))  # sequences, tokens, position of the first
    for dtype in dtypes:
        for kind, place in zip(kinds, places, strict=True):
            for plain in (True, False):
                check_one_rope(decode_triton, device, early, dtype, kind, place, joined=plain, extras=not plain)


def check_one_rope(
    kernels: Any,
    device: str,
    early: bool,
    dtype: torch.dtype,
    kind: tuple[int, int, int],
    place: tuple[int, int, int],
    *,
    joined: bool,
    extras: bool,
) -> None:
    """joined: q, k and v are parts of one tensor. extras: with biases and norms."""
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
    if q_norm is not None and k_norm is not None:
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

    kinds = ((4, 4, 64), (8, 2, 128), (8, 1, 80), (20, 1, 16))  # heads, key-value heads, width
    places = ((0, 0, 1), (1, 1, 3), (64, 0, 1), (150, 0, 2), (199, 0, 5), (150, 70, 3), (199, 64, 1), (5, 70, 2))
    for dtype in dtypes:
        for heads, kv_heads, width in kinds:
            for position, window, splits in places:
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
                k, v = (each[:, :, seen].double().repeat_interleave(heads // kv_heads, 1) for each in (keys, values))
                scores = torch.einsum("bhd,bhnd->bhn", q.double(), k) / math.sqrt(width)
                close(y, torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), v), dtype)


def check_gate(device: str, early: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    from tersor.kernels import decode_triton

    for dtype in dtypes:
        for rows, size in ((3, 100), (1, 700)):
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
    dtypes = "(torch.float32, torch.bfloat16)"
    run_interpreted(
        f"from kernels import test_decode_triton\ntest_decode_triton.check_{kernel}('cpu', dtypes={dtypes})"
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_attention_interpreted(dtype: str) -> None:
    run_interpreted(
        f"from kernels import test_decode_triton\ntest_decode_triton.check_attend('cpu', dtypes=(torch.{dtype},))"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", [check_add_norm, check_rope, check_attend, check_gate, check_pick])
@pytest.mark.parametrize("early", [False, True])
def test_on_a_gpu(check: Any, early: bool) -> None:
    from tersor.kernels import decode_triton

    if early and not decode_triton.launches_early(torch.device("cuda", 0)):
        pytest.skip("this GPU or Triton has no programmatic dependent launch")
    torch.manual_seed(0)
    check("cuda", early, (torch.float16, torch.bfloat16))


def test_every_kernel_compiles_for_gpus() -> None:
    """What the interpreter lets through and the compiler does not. Needs no GPU."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tersor.kernels import decode_triton as d

    def types(kernel: Any, **named: str) -> dict[str, str]:
        others = {name: "*bf16" if name.endswith("_pointer") else "i32" for name in kernel.arg_names}
        return others | named

    norm = types(d._add_norm, residual_pointer="*fp32", eps="fp32")
    rope = types(d._rope, bias_pointer="*fp32", cos_pointer="*fp32", sin_pointer="*fp32", position_pointer="*i64")
    attend = types(d._attend, position_pointer="*i64", scale="fp32")
    parts = {"pieces_pointer": "*fp32", "maxima_pointer": "*fp32", "totals_pointer": "*fp32"}
    picked = {"maxima_pointer": "*fp32", "places_pointer": "*i32", "position_pointer": "*i64"}
    pick = types(d._pick, **picked, ids_pointer="*i64", made_pointer="*i64")
    heads = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BIAS": True, "NORM": True, "BLOCK_HALF": 64}
    shape = {"GROUP": 4, "WIDTH": 80, "BLOCK_G": 16, "BLOCK_D": 128, "BLOCK_N": d.BLOCK_N}
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (d._add_norm, norm | {"ids_pointer": "*i64"}, {"FIRST": True, "BIAS": False, "BLOCK": 4096}),
        (d._add_norm, norm, {"FIRST": False, "BIAS": True, "BLOCK": 4096}),
        (d._rope, rope | {"eps": "fp32"}, {**heads, "BLOCK_HEADS": 1, "tokens": 1}),
        (d._rope, rope | {"eps": "fp32"}, {**heads, "BLOCK_HEADS": 16}),
        (d._attend, attend | parts, {**shape, "SPLITS": 1, "WINDOW": 0}),
        (d._attend, attend | parts, {**shape, "SPLITS": 4, "WINDOW": 100}),
        (d._merge, types(d._merge) | parts, {"WIDTH": 80, "SPLITS": 33, "BLOCK_S": 64, "BLOCK_D": 128}),
        (d._gate, types(d._gate), {"BIAS": True, "BLOCK": d.GATE_BLOCK}),
        (d._largest, types(d._largest, logits_pointer="*fp32", **picked), {"BLOCK": d.PICK_BLOCK}),
        (d._pick, pick, {"BLOCK_ROWS": 16, "BLOCK": 64}),
        (d._pick, pick, {"BLOCK_ROWS": 1, "BLOCK": 1, "batch": 1, "parts": 1}),  # triton makes a 1 a constant
    ]
    for kernel, signature, constants in cases:
        for capability, early in ((90, True), (80, False)) if kernel is d._attend else ((90, True),):
            given = {**constants, "EARLY": early}
            kinds = {name: "constexpr" if name in given else signature[name] for name in kernel.arg_names}
            source = ASTSource(kernel, kinds, {(kernel.arg_names.index(name),): each for name, each in given.items()})
            compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            code = compiled.asm["ptx"]
            assert ("griddepcontrol.wait" in code) == early
            if early:  # nothing is written, and no more than constants are read, before the wait
                before = code[: code.index("griddepcontrol.wait")]
                assert "st.global" not in before
                assert ("ld.global" in before) == (kernel is d._add_norm)


def test_splits_fill_the_machine_and_are_no_shorter_than_a_block() -> None:
    pytest.importorskip("triton")
    from tersor.kernels.decode_triton import splits_for

    assert splits_for(1, 8, 256, 132) == 4
    assert splits_for(1, 8, 100_000, 132) == 33
    assert splits_for(32, 8, 100_000, 132) == 1
    assert splits_for(64, 32, 10, 132) == 1
