"""Integers of 1 to 8 bits in 32-bit words, the way GPTQ, compressed-tensors and their readers lay them out.

The values form one little-endian bit stream: value k occupies stream bits [bits*k, bits*k + bits), word w holds stream bits
[32*w, 32*w + 32). For 2, 4 and 8 bits a word thus holds 32/bits whole values, the first in the lowest bits; for 3 bits
32 values fill exactly three words. AWQ permutes the eight nibbles of a word (`AWQ_ORDER`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32  # bits
WORD_BYTES = WORD // 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble n of an AWQ word holds column AWQ_ORDER[n] of its eight


def packed_size(count: int, bits: int) -> int:
    """Number of 32-bit words that `count` values of `bits` bits take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int, *, dim: int) -> Tensor:
    """Pack integers 0 .. 2^bits - 1 along `dim` into int32 words; the last word is filled up with zeros."""
    values = codes.movedim(dim, -1)  # [..., count]
    period = math.lcm(bits, WORD) // bits  # the fewest values that fill whole words
    words_per_period = period * bits // WORD
    count = values.shape[-1]
    padded = -(-count // period) * period
    values = torch.nn.functional.pad(values, (0, padded - count))
    values = values.reshape(*values.shape[:-1], -1, period)
    words = values.new_zeros((*values.shape[:-1], words_per_period), dtype=torch.int32)
    for k in range(period):
        word, shift = divmod(k * bits, WORD)
        value = values[..., k].to(torch.int32)
        words[..., word] |= value << shift
        if shift + bits > WORD:  # the value straddles two words
            words[..., word + 1] |= value >> (WORD - shift)
    return words.flatten(-2)[..., : packed_size(count, bits)].movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, count: int, *, dim: int) -> Tensor:
    """The first `count` integers of a packed stream along `dim`, as uint8. Inverse of `pack`."""
    stream = words.movedim(dim, -1)  # [..., words]
    period = math.lcm(bits, WORD) // bits
    words_per_period = period * bits // WORD
    padded = -(-stream.shape[-1] // words_per_period) * words_per_period
    stream = torch.nn.functional.pad(stream, (0, padded - stream.shape[-1]))
    stream = stream.reshape(*stream.shape[:-1], padded // words_per_period, words_per_period)
    values = torch.empty((*stream.shape[:-1], period), dtype=torch.uint8, device=words.device)
    for k in range(period):
        word, shift = divmod(k * bits, WORD)
        value = stream[..., word] >> shift  # the shift copies the sign into the top bits
        if shift + bits > WORD:
            value = (value & (2 ** (WORD - shift) - 1)) | (stream[..., word + 1] << (WORD - shift))
        values[..., k] = (value & (2**bits - 1)).to(torch.uint8)
    return values.flatten(-2)[..., :count].movedim(-1, dim).contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ's 4-bit words, packed along the last dimension in AWQ's nibble order, as uint8 in natural order."""
    nibbles = torch.stack([(words >> (4 * n)) & 15 for n in range(8)], dim=-1).to(torch.uint8)
    inverse = [AWQ_ORDER.index(column) for column in range(8)]
    return nibbles[..., inverse].flatten(-2)
