"""The blocks in which a GGUF file holds quantized weights: 32 neighbouring inputs of one output with a float16 step d.

| type | bytes | layout of a block | a weight is | integers |
| --- | --- | --- | --- | --- |
| Q4_0 | 18 | d, 16 bytes of two codes | d * (q - 8) | -8 .. 7 |
| Q4_1 | 20 | d, float16 m, 16 bytes of two codes | d * q + m | 0 .. 15, counted from m |
| Q5_0 | 22 | d, 32 fifth bits, 16 bytes of two codes | d * (q - 16) | -16 .. 15 |
| Q8_0 | 34 | d, 32 int8 | d * q | -128 .. 127 |

Byte j of the codes holds q[j] in its low and q[j + 16] in its high nibble. Source: the GGUF specification and ggml's block
definitions. A weight is written exactly: the same integers times the same steps. A block stores the distance of each code from
its zero point. At 2 and 3 bits the distances reach 7, so they fit Q4_0; 4 bits with zero points anywhere fit Q5_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.quantized_weight import QuantizedWeight

BLOCK = 32  # inputs


@dataclass(frozen=True)
class BlockType:
    """A type of block."""

    name: str
    bytes: int
    low: int  # the range of the integers
    high: int

    @property
    def suffix(self) -> str:
        return f"gguf_{self.name.lower()}"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / BLOCK


BLOCK_TYPES = {  # smallest first
    each.name: each
    for each in (
        BlockType("Q4_0", 18, -8, 7),
        BlockType("Q4_1", 20, 0, 15),
        BlockType("Q5_0", 22, -16, 15),
        BlockType("Q8_0", 34, -128, 127),
    )
}
GGUF_SUFFIXES = tuple(each.suffix for each in BLOCK_TYPES.values())


def choose_type(name: str, weight: QuantizedWeight) -> BlockType:
    """The smallest type that holds the layer `name` exactly. Raises TersorError with the reason where none does."""
    scales, zeros = _of_blocks(name, weight)
    integers = _integers(weight)
    low, high = int(integers.min()), int(integers.max())
    for each in BLOCK_TYPES.values():
        if each.name == "Q4_1":
            minimum = -scales * zeros  # exact in float32: 11 bits times at most 8
            fits = weight.bits <= 4 and bool((minimum.half().float() == minimum).all())
        else:
            fits = each.low <= low and high <= each.high
        if fits:
            return each
    raise TersorError(
        f"{name} ({weight.bits} bits, asymmetric): its integers reach from {low} to {high} about their zero points, and the "
        "widest GGUF type holds -128 to 127; quantize 8 bits with --sym"
    )


def pack_blocks(name: str, weight: QuantizedWeight, kind: BlockType) -> Tensor:
    """uint8 [out, in / 32 * kind.bytes]. kind: from `choose_type`. Raises TersorError as that does."""
    scales, zeros = _of_blocks(name, weight)
    integers = _integers(weight).view(weight.out_features, -1, BLOCK)  # [out, blocks, 32]
    step = _bytes_of(scales)
    if kind.name == "Q8_0":
        parts = [step, integers.to(torch.int8).view(torch.uint8)]
    elif kind.name == "Q4_1":
        parts = [step, _bytes_of(-scales * zeros), _nibbles(integers + zeros[..., None].to(torch.int16))]
    elif kind.name == "Q5_0":
        codes = integers + 16
        fifth = _bits_to_bytes(codes >> 4)
        parts = [step, fifth, _nibbles(codes & 15)]
    else:
        parts = [step, _nibbles(integers + 8)]
    return torch.cat(parts, -1).flatten(1)


def unpack_blocks(name: str, blocks: Tensor, kind: BlockType, in_features: int) -> QuantizedWeight:
    """The layer with groups of 32, of 4 or 8 bits: Q5_0 becomes 4 bits where each block's integers lie within 16, else 8 bits.

    Raises TersorError where the shape does not fit, and for Q4_1 whose minimum is no multiple of its step (`on_grid`).
    """
    columns = in_features // BLOCK * kind.bytes
    if in_features % BLOCK or blocks.dim() != 2 or blocks.shape[1] != columns:
        raise TersorError(
            f"{name} has rows of {blocks.shape[-1]} bytes; {in_features} inputs in {kind.name} need {columns}"
        )
    scales, minimum, codes = _split(blocks, kind)
    for values in (scales, minimum):
        if values is not None and not bool(torch.isfinite(values).all()):
            row, block = (int(n) for n in (~torch.isfinite(values)).nonzero()[0])
            raise TersorError(f"{name}: the step of output {row}, block {block} is not finite (NaN or Inf)")
    if kind.name == "Q4_0":
        zeros, bits = torch.full_like(scales, 8), 4
    elif kind.name == "Q8_0":
        codes, zeros, bits = codes.to(torch.int16) + 128, torch.full_like(scales, 128), 8
    elif kind.name == "Q4_1":
        assert minimum is not None
        if not on_grid(blocks, kind):
            raise TersorError(f"{name} is Q4_1 with a minimum that is no multiple of its step: it has no zero point")
        zeros, bits = _zero_points(scales, minimum), 4
    else:
        codes = codes.to(torch.int16) - 16
        low, high = codes.amin(-1), codes.amax(-1)
        lift = (-low).clamp(min=0)  # the zero point with which the least integer is code 0
        if bool((high + lift <= 15).all()):
            codes, zeros, bits = codes + lift[..., None], lift, 4
        else:
            codes, zeros, bits = codes + 128, torch.full_like(scales, 128), 8
    return QuantizedWeight.from_codes(
        codes.to(torch.uint8).flatten(1), scales.half().t(), zeros.t(), bits=bits, group_size=BLOCK
    )


def dequantize_blocks(blocks: Tensor, kind: BlockType) -> Tensor:
    """The weights as float32 [..., in]. blocks: uint8 [..., in / 32 * kind.bytes]."""
    scales, minimum, codes = _split(blocks, kind)
    offset = {"Q4_0": 8, "Q5_0": 16}.get(kind.name, 0)
    values = scales[..., None] * (codes.float() - offset)
    return (values if minimum is None else values + minimum[..., None]).flatten(-2)


def on_grid(blocks: Tensor, kind: BlockType) -> bool:
    """Whether every zero point is a whole number, as a QuantizedWeight needs. Only in Q4_1 it may not be."""
    if kind.name != "Q4_1":
        return True
    head = _apart(blocks, kind.bytes)[..., :4]
    scales, minimum = _halves(head[..., :2]), _halves(head[..., 2:])
    zeros = _zero_points(scales, minimum)
    return bool(((zeros >= 0) & (zeros <= 15) & (zeros * scales == -minimum)).all())


def _zero_points(scales: Tensor, minimum: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.zeros_like(scales), torch.round(-minimum / scales))


def _of_blocks(name: str, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Steps and zero points of every block, float32 [out, blocks]. Raises TersorError where blocks cannot hold the layer."""
    if weight.in_features % BLOCK:
        raise TersorError(
            f"{name} has {weight.in_features} inputs; GGUF blocks need a multiple of {BLOCK}: exclude the layer"
        )
    groups = weight.groups().view(-1, BLOCK)
    if bool((groups != groups[:, :1]).any()):
        if weight.g_idx is not None:
            raise TersorError(
                f"{name} has its groups scattered over the columns (act-order), and llama.cpp knows no order of columns; "
                "quantize with --static-groups, or without --desc-act"
            )
        raise TersorError(
            f"{name} has groups of {weight.group_size}; GGUF blocks need a multiple of {BLOCK}, or -1: "
            "quantize with --group-size 32"
        )
    half = weight.scales.half()
    lost = half.to(weight.scales.dtype) != weight.scales
    if bool(lost.any()):
        group, output = (int(n) for n in lost.nonzero()[0])
        raise TersorError(
            f"{name}: the step {float(weight.scales[group, output]):.6g} of group {group}, output {output} is no float16 number, "
            "which GGUF blocks hold; quantize with --format gptq, whose steps are float16"
        )
    first = groups[:, 0]
    return half.float()[first].t(), weight.zeros.float()[first].t()


def _integers(weight: QuantizedWeight) -> Tensor:
    """Distances of the codes from their zero points, int16 [out, in]."""
    return weight.codes().to(torch.int16) - weight.zeros.to(torch.int16)[weight.groups()].t()


def _split(blocks: Tensor, kind: BlockType) -> tuple[Tensor, Tensor | None, Tensor]:
    """Steps float32 [..., blocks], minima of Q4_1 likewise, and codes as stored [..., blocks, 32]."""
    apart = _apart(blocks, kind.bytes)
    scales = _halves(apart[..., :2])
    if kind.name == "Q8_0":
        return scales, None, apart[..., 2:].contiguous().view(torch.int8)
    packed = apart[..., -16:]
    codes = torch.cat([packed & 15, packed >> 4], -1)
    if kind.name == "Q5_0":
        places = torch.arange(8, dtype=torch.uint8)
        codes = codes | (((apart[..., 2:6, None] >> places) & 1) << 4).flatten(-2)
    return scales, _halves(apart[..., 2:4]) if kind.name == "Q4_1" else None, codes


def _apart(values: Tensor, size: int) -> Tensor:
    """[..., n * size] -> [..., n, size]"""
    return values.reshape(*values.shape[:-1], -1, size)


def _halves(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).float()[..., 0]


def _bytes_of(values: Tensor) -> Tensor:
    """float16 as two bytes each: [..., n] -> uint8 [..., n, 2]."""
    return values.half()[..., None].contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """[..., 32] integers 0 .. 15 -> uint8 [..., 16]."""
    codes = codes.to(torch.uint8)
    return codes[..., :16] | (codes[..., 16:] << 4)


def _bits_to_bytes(bits: Tensor) -> Tensor:
    """[..., 32] zeros and ones -> uint8 [..., 4], the first in the lowest bit."""
    places = torch.arange(8, dtype=torch.int16)
    return (_apart(bits, 8) << places).sum(-1).to(torch.uint8)
