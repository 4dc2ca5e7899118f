"""Packing is lossless, one continuous little-endian bit stream, along either dimension."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.formats.packing import pack, packed_size, unpack


@st.composite
def codes(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits, count, others = draw(st.integers(1, 8)), draw(st.integers(1, 100)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(0, 2**bits, (others, count), generator=generator, dtype=torch.uint8), bits


@given(codes(), st.sampled_from([0, 1]))
def test_unpacking_gives_back_what_was_packed(packed: tuple[Tensor, int], dim: int) -> None:
    values, bits = packed
    values = values.movedim(1, dim)
    words = pack(values, bits, dim=dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == packed_size(values.shape[dim], bits)
    assert torch.equal(unpack(words, bits, values.shape[dim], dim=dim), values)


@given(codes())
def test_words_are_one_little_endian_bit_stream(packed: tuple[Tensor, int]) -> None:
    values, bits = packed
    words = pack(values, bits, dim=1)
    for row, got in zip(values.tolist(), words.tolist(), strict=True):
        stream = sum(value << (bits * k) for k, value in enumerate(row))
        expected = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(got))]
        assert [word & 0xFFFFFFFF for word in got] == expected


@given(codes())
def test_words_do_not_depend_on_the_dimension(packed: tuple[Tensor, int]) -> None:
    values, bits = packed
    assert torch.equal(pack(values, bits, dim=1), pack(values.t(), bits, dim=0).t())
