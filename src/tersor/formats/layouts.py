"""The tensors of one quantized linear layer on disk: GPTQ (v1, v2), compressed-tensors `pack-quantized`, AWQ (read only).

All are read into, and all but AWQ written from, `QuantizedWeight`. Shapes (W is [out, in], G groups, packed_size as in packing):

| layout | tensor | shape | dtype | content |
| --- | --- | --- | --- | --- |
| gptq | qweight | [packed_size(in), out] | int32 | codes, packed along the input |
| | qzeros | [G, packed_size(out)] | int32 | zero points (v2) or zero points minus one (v1), packed along the output |
| | scales | [G, out] | float16 / bfloat16 | |
| | g_idx | [in] | int32 | group of each input |
| compressed-tensors | weight_packed | [out, packed_size(in)] | int32 | codes, packed along the input |
| | weight_scale | [out, G] | model dtype | |
| | weight_shape | [2] | int64 | out, in |
| | weight_zero_point | [packed_size(out), G] | int32 | asymmetric only, packed along the output |
| | weight_g_idx | [in] | int32 | act-order with dynamic groups only |
| awq | qweight, qzeros, scales | [in, out/8], [G, out/8], [G, out] | int32, int32, float16 | packed along the output |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.gguf_blocks import GGUF_SUFFIXES
from tersor.formats.packing import WORD, pack, packed_size, unpack, unpack_awq
from tersor.formats.quantized_weight import QuantizedWeight

GPTQ_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
COMPRESSED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)
PACKED_SUFFIXES = (*GPTQ_SUFFIXES, *COMPRESSED_SUFFIXES, *GGUF_SUFFIXES)  # of every layout that is read
BITS = (2, 3, 4, 8)  # what the formats and their readers share


@dataclass(frozen=True)
class Layout:
    """What a format on disk asks of the numbers that go into it.

    scale_dtype: precision of the steps; None means the model's own. min_zero: the smallest zero point that every reader
    understands. word_columns, word_rows: numbers of inputs and outputs that fill whole words, 1 where the format pads.
    embeddings: whether other readers of the format know packed embeddings.
    """

    name: str
    scale_dtype: torch.dtype | None
    min_zero: int
    word_columns: int
    word_rows: int
    embeddings: bool

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """The size of a layer that fills no whole words, such as "80 outputs"; None where the layer fits."""
        if in_features % self.word_columns:
            return f"{in_features} inputs"
        return f"{out_features} outputs" if out_features % self.word_rows else None


LAYOUTS = {
    # v1 stores z - 1: a zero point of 0 wraps, and three writers and their readers disagree on how
    "gptq": Layout("gptq", torch.float16, min_zero=1, word_columns=WORD, word_rows=WORD, embeddings=False),
    "gptq_v2": Layout("gptq_v2", torch.float16, min_zero=0, word_columns=WORD, word_rows=WORD, embeddings=False),
    "compressed-tensors": Layout("compressed-tensors", None, min_zero=0, word_columns=1, word_rows=1, embeddings=True),
}


def layout_named(name: str) -> Layout:
    if name not in LAYOUTS:
        raise TersorError(f"unknown format {name!r}; known: {', '.join(LAYOUTS)}, auto")
    return LAYOUTS[name]


def bytes_of(
    rows: int, columns: int, bits: int, group_size: int, layout: Layout | None, scale_dtype: torch.dtype, *, sym: bool
) -> int:
    """What one layer [rows, columns] of natural groups takes on disk, its steps in scale_dtype."""
    groups = -(-columns // (columns if group_size == -1 else group_size))
    codes, zeros = 4 * packed_size(columns, bits) * rows, 4 * groups * packed_size(rows, bits)
    steps = scale_dtype.itemsize * groups * rows
    if layout is not None and layout.name != "compressed-tensors":
        return codes + steps + zeros + 4 * columns
    return codes + steps + 16 + (0 if sym else zeros)


def write(weight: QuantizedWeight, layout: Layout, *, sym: bool) -> dict[str, Tensor]:
    """The tensors of one layer by suffix, on the CPU."""
    weight = weight.to("cpu")
    if layout.name == "compressed-tensors":
        return _write_compressed(weight, sym=sym)
    return _write_gptq(weight, v2=layout.name == "gptq_v2")


def _write_gptq(weight: QuantizedWeight, *, v2: bool) -> dict[str, Tensor]:
    zeros = weight.zeros if v2 else (weight.zeros.to(torch.int64) - 1) % 2**weight.bits
    return {
        "qweight": weight.qweight,
        "qzeros": pack(zeros, weight.bits, dim=1),
        "scales": weight.scales,
        "g_idx": weight.groups().to(torch.int32),
    }


def _write_compressed(weight: QuantizedWeight, *, sym: bool) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": weight.qweight.t().contiguous(),  # q + 2^(bits-1) of the signed q is our unsigned code
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = pack(weight.zeros.t(), weight.bits, dim=0)
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def read_gptq(
    name: str,
    tensors: Mapping[str, Tensor],
    in_features: int,
    *,
    bits: int,
    group_size: int,
    v2: bool,
    sym: bool,
    whole_word_zeros: bool = False,
) -> QuantizedWeight:
    """Read one layer. `bits`, `group_size`, `v2` are the config's claims; the tensors themselves win where they disagree:
    symmetric zero points are one constant, 2^(bits-1) as stored by v2 and one less by v1.

    whole_word_zeros: v1 zero points were made by subtracting a constant from whole words (GPTQModel at 2, 4 and 8 bits),
    so that a zero point of 0 borrows from its neighbour. Raises TersorError naming the tensor that does not fit.
    """
    _require(name, tensors, ("qweight", "qzeros", "scales"))
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    _expect_matrix(f"{name}.qweight", qweight)
    _expect_matrix(f"{name}.scales", scales)
    out_features = qweight.shape[1]
    bits = _bits_that_fit(f"{name}.qweight", qweight.shape[0], in_features, bits)
    groups = scales.shape[0]
    _expect(f"{name}.scales", scales, (groups, out_features))
    _expect(f"{name}.qzeros", qzeros, (groups, packed_size(out_features, bits)))
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        _expect(f"{name}.g_idx", g_idx, (in_features,))
        g_idx = _checked_groups(f"{name}.g_idx", g_idx, groups)
    group_size = _group_size_that_fits(f"{name}.scales", groups, in_features, group_size, g_idx)

    stored = unpack(qzeros, bits, out_features, dim=1)
    if sym and bool((stored == stored[0, 0]).all()):
        v2 = {2 ** (bits - 1): True, 2 ** (bits - 1) - 1: False}.get(int(stored[0, 0]), v2)
    if v2:
        zeros = stored
    elif whole_word_zeros and bits != 3:
        one = sum(1 << (bits * k) for k in range(WORD // bits))
        words = (qzeros.to(torch.int64) + one) & 0xFFFFFFFF
        zeros = unpack(words, bits, out_features, dim=1)
    else:
        zeros = (stored + 1) & (2**bits - 1)
    return _weight(f"{name}.scales", qweight, scales, zeros, g_idx, bits, group_size, in_features)


def read_compressed(
    name: str, tensors: Mapping[str, Tensor], in_features: int, *, bits: int, group_size: int
) -> QuantizedWeight:
    """Read one compressed-tensors `pack-quantized` layer; 3 bits in both packings (dense, and ten values a word)."""
    _require(name, tensors, ("weight_packed", "weight_scale"))
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    _expect_matrix(f"{name}.weight_packed", packed)
    scales = scales.view(-1, 1) if scales.dim() == 1 else scales
    _expect_matrix(f"{name}.weight_scale", scales)
    out_features = packed.shape[0]
    if "weight_shape" in tensors:
        shape = tensors["weight_shape"].tolist()
        if shape != [out_features, in_features]:
            raise TersorError(f"{name}.weight_shape says {shape}; the layer is [{out_features}, {in_features}]")
    dense, sparse = packed_size(in_features, bits), -(-in_features // (WORD // bits))
    if packed.shape[1] == dense:
        qweight = packed.t().contiguous()
    elif packed.shape[1] == sparse:
        qweight = pack(_unpack_whole_values(packed, bits, in_features), bits, dim=1).t().contiguous()
    else:
        raise TersorError(f"{name}.weight_packed has {packed.shape[1]} words a row; {bits} bits need {dense}")
    groups = scales.shape[1]
    _expect(f"{name}.weight_scale", scales, (out_features, groups))
    stored_zeros = tensors.get("weight_zero_point")
    if stored_zeros is None:
        zeros = torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8)
    elif stored_zeros.shape == (packed_size(out_features, bits), groups):
        zeros = unpack(stored_zeros, bits, out_features, dim=0).t()
    elif stored_zeros.shape == (out_features, groups):  # not packed: signed integers
        zeros = (stored_zeros.to(torch.int64).t() + 2 ** (bits - 1)).to(torch.uint8)
    else:
        rows = packed_size(out_features, bits)
        raise TersorError(f"{name}.weight_zero_point is {tuple(stored_zeros.shape)}; expected {(rows, groups)}")
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None:
        _expect(f"{name}.weight_g_idx", g_idx, (in_features,))
        g_idx = _checked_groups(f"{name}.weight_g_idx", g_idx, groups)
    group_size = _group_size_that_fits(f"{name}.weight_scale", groups, in_features, group_size, g_idx)
    return _weight(f"{name}.weight_scale", qweight, scales.t(), zeros, g_idx, bits, group_size, in_features)


def read_awq(name: str, tensors: Mapping[str, Tensor], in_features: int, *, group_size: int) -> QuantizedWeight:
    """Read one AWQ "GEMM" layer of 4 bits."""
    _require(name, tensors, ("qweight", "qzeros", "scales"))
    for suffix in ("qweight", "qzeros", "scales"):
        _expect_matrix(f"{name}.{suffix}", tensors[suffix])
    codes, zeros = unpack_awq(tensors["qweight"]), unpack_awq(tensors["qzeros"])  # [in, out], [groups, out]
    scales = tensors["scales"]
    _expect(f"{name}.qweight", codes, (in_features, scales.shape[1]))
    _expect(f"{name}.qzeros", zeros, tuple(scales.shape))
    group_size = _group_size_that_fits(f"{name}.scales", scales.shape[0], in_features, group_size, None)
    return _weight(f"{name}.scales", pack(codes, 4, dim=0), scales, zeros, None, 4, group_size, in_features)


def _weight(
    scales_name: str,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> QuantizedWeight:
    bad = ~torch.isfinite(scales.float()) | (scales <= 0)
    if bool(bad.any()):
        group, output = (int(n) for n in bad.nonzero()[0])
        raise TersorError(
            f"{scales_name}: the step of group {group}, output {output} is {float(scales[group, output])}"
        )
    natural = torch.arange(in_features) // (in_features if group_size == -1 else group_size)
    if g_idx is not None and torch.equal(g_idx.cpu().long(), natural):
        g_idx = None
    return QuantizedWeight(
        qweight, scales.contiguous(), zeros.to(torch.uint8).contiguous(), g_idx, bits, group_size, in_features
    )


def _unpack_whole_values(words: Tensor, bits: int, count: int) -> Tensor:
    """The older packing of 3, 5, 6 and 7 bits: only whole values in a word, its top bits empty."""
    stream = words.to(torch.int64) & 0xFFFFFFFF
    values = torch.stack([(stream >> (bits * k)) & (2**bits - 1) for k in range(WORD // bits)], dim=-1)
    return values.flatten(-2)[..., :count].to(torch.uint8)


def _require(name: str, tensors: Mapping[str, Tensor], suffixes: tuple[str, ...]) -> None:
    for suffix in suffixes:
        if suffix not in tensors:
            raise TersorError(f"the checkpoint lacks {name}.{suffix}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise TersorError(f"{name} is {tuple(tensor.shape)}; expected {shape}")


def _expect_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise TersorError(f"{name} is {tuple(tensor.shape)}; expected a matrix")


def _bits_that_fit(name: str, words: int, in_features: int, claimed: int) -> int:
    for bits in (claimed, *BITS):
        if words == packed_size(in_features, bits):
            return bits
    raise TersorError(f"{name} has {words} rows, which hold {in_features} inputs at none of {BITS} bits")


def _group_size_that_fits(name: str, groups: int, in_features: int, claimed: int, g_idx: Tensor | None) -> int:
    for size in (claimed, in_features // groups):
        if -(-in_features // (in_features if size == -1 else max(size, 1))) == groups:
            return size
    if g_idx is not None:  # every column says its group: the size is only a label
        return -(-in_features // groups)
    raise TersorError(f"{name} holds {groups} groups, which {in_features} inputs do not divide into")


def _checked_groups(name: str, g_idx: Tensor, groups: int) -> Tensor:
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise TersorError(f"{name} reaches from {low} to {high}; the layer has {groups} groups")
    return g_idx.to(torch.int32)
