"""A packed weight in the layout that the GPU kernel streams: tiles of 64 outputs x 128 inputs, codes and scales together.

`packed_tile.cuh` describes the layout at its top. `prepare` makes it once, on the weight's device. `restore` is the inverse, so
a model holds only one copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight

K_TILE, N_BLOCK = 128, 64  # inputs and outputs of a tile
_FIELDS = {2: 8, 3: 5, 4: 4, 8: 2}  # pairs of codes in a word; at 3 bits, two bits are left over
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}  # words of half a tile that a thread loads at once
_MEBIBYTES_AT_ONCE = 256  # of codes, while repacking


@dataclass(frozen=True)
class TiledWeight:
    """A weight [out, in] as the kernel reads it.

    tiles: uint8 [ceil(out / 64), ceil(in / 128), bytes of a tile]
    order: int64 [in], the input column at every position of the tiles; None: the natural order.
    zero:  the one zero point of all groups, or -1 where the tiles hold one per group.
    group_size: input columns a group, 32, 64 or a multiple of 128; -1 for one group of all columns.
    """

    tiles: Tensor
    order: Tensor | None
    bits: int
    group_size: int
    zero: int
    scale_dtype: torch.dtype
    in_features: int
    out_features: int

    @property
    def tile_group(self) -> int:
        """Input columns that share a scale within a tile; wider groups repeat theirs in every tile."""
        return self.group_size if self.group_size in (32, 64) else K_TILE

    def to(self, device: torch.device | str) -> TiledWeight:
        order = None if self.order is None else self.order.to(device)
        return replace(self, tiles=self.tiles.to(device), order=order)


def why_not(weight: QuantizedWeight) -> str | None:
    """Why `prepare` cannot take this weight, or None."""
    if weight.a_bits is not None:
        return "inputs that are rounded"
    if weight.bits not in _FIELDS:
        return f"{weight.bits} bits (has kernels for {sorted(_FIELDS)})"
    group_size = _group_size(weight)
    if group_size not in (-1, 32, 64) and group_size % K_TILE != 0:
        return f"groups of {group_size} (has kernels for 32, 64 and multiples of {K_TILE})"
    if weight.g_idx is not None:
        natural = torch.arange(weight.in_features, device=weight.g_idx.device) // weight.group_size
        if group_size != -1 and not torch.equal(weight.g_idx.long().sort().values, natural):
            return f"a g_idx whose groups are not {group_size} columns each"
    return None


def _group_size(weight: QuantizedWeight) -> int:
    return -1 if weight.scales.shape[0] == 1 else weight.group_size


def prepare(weight: QuantizedWeight) -> TiledWeight:
    """Repack for the kernel. Columns of an act-order weight are permuted so that groups lie side by side."""
    if reason := why_not(weight):
        raise ValueError(f"no GPU kernel for {reason}; use the reference")
    bits, group_size = weight.bits, _group_size(weight)
    order = None if weight.g_idx is None or group_size == -1 else weight.g_idx.long().argsort(stable=True)
    zero = int(weight.zeros.flatten()[0])
    if not bool((weight.zeros == zero).all()):
        zero = -1
    scale_dtype = torch.bfloat16 if weight.scales.dtype == torch.bfloat16 else torch.float16
    tile_group = group_size if group_size in (32, 64) else K_TILE
    k_tiles, blocks = -(-weight.in_features // K_TILE), -(-weight.out_features // N_BLOCK)

    # Scales and zero points: [groups, out] -> [blocks, k tiles, groups of a tile * 64 outputs].
    starts = torch.arange(0, k_tiles * K_TILE, tile_group, device=weight.scales.device)
    group_of = (starts // (weight.in_features if group_size == -1 else group_size)).clamp(max=len(weight.scales) - 1)

    def by_tile(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values[group_of], (0, blocks * N_BLOCK - weight.out_features))
        return padded.view(k_tiles, -1, blocks, N_BLOCK).permute(2, 0, 1, 3).reshape(blocks, k_tiles, -1).contiguous()

    parts = [by_tile(weight.scales.to(scale_dtype)).view(torch.uint8)]
    if zero < 0:
        parts.append(by_tile(weight.zeros))

    tile_bytes = N_BLOCK * K_TILE * bits // 8 + sum(part.shape[-1] for part in parts)
    tiles = torch.empty(blocks, k_tiles, tile_bytes, dtype=torch.uint8, device=weight.qweight.device)
    tiles[..., N_BLOCK * K_TILE * bits // 8 :] = torch.cat(parts, dim=-1)
    step = max(1, _MEBIBYTES_AT_ONCE * 2**20 // (N_BLOCK * k_tiles * K_TILE))
    for first in range(0, blocks, step):
        rows = slice(first * N_BLOCK, min((first + step) * N_BLOCK, weight.out_features))
        columns = replace(
            weight, qweight=weight.qweight[:, rows], scales=weight.scales[:, rows], zeros=weight.zeros[:, rows]
        )
        codes = columns.codes() if order is None else columns.codes()[:, order]
        tiles[first : first + step, :, : N_BLOCK * K_TILE * bits // 8] = _pack_tiles(codes, bits)
    if tiles.is_cuda:  # the kernel fetches its weight without waiting for the kernels before it
        torch.cuda.synchronize(tiles.device)
    return TiledWeight(tiles, order, bits, group_size, zero, scale_dtype, weight.in_features, weight.out_features)


def _pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Integers uint8 [out, in] as the code bytes of tiles, uint8 [blocks, k tiles, bytes]."""
    out_features, in_features = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -in_features % K_TILE, 0, -out_features % N_BLOCK))
    # Output 16 warp + 2 g + r, input 64 half + 16 step + 8 upper + 2 t + second, to wgmma's fragments:
    # thread (warp, g, t), pair (step, upper, r), and which of the pair.
    split = codes.reshape(-1, 4, 8, 2, codes.shape[1] // K_TILE, 2, 4, 2, 4, 2)
    pairs = split.permute(0, 4, 5, 1, 2, 8, 6, 7, 3, 9).reshape(split.shape[0], split.shape[4], 2, 128, 16, 2)
    pairs = pairs.to(torch.int32)
    fields = _FIELDS[bits]
    whole = (
        bits * fields
    )  # pairs that have a place of their own; of 3 bits, pair 15 takes the two bits each word has left
    split = pairs[..., :whole, :].reshape(*pairs.shape[:4], bits, fields, 2)
    words = torch.stack([split[..., field, :] << (bits * field) for field in range(fields)]).sum(0, dtype=torch.int32)
    if bits == 3:
        words = words | torch.stack([((pairs[..., 15, :] >> bit) & 1) << 15 for bit in range(3)], dim=-2)
    words = words[..., 0] | (words[..., 1] << 16)  # [blocks, k tiles, half, thread, words]
    planes = [plane.flatten(-2) for plane in torch.split(words, list(_PLANES[bits]), dim=-1)]
    return torch.cat(planes, dim=-1).contiguous().view(torch.uint8).flatten(2)


def _unpack_tiles(tiles: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack_tiles`, with the padding: uint8 [64 blocks, 128 k tiles]."""
    blocks, k_tiles, _ = tiles.shape
    halves = tiles.reshape(blocks, k_tiles, 2, -1).contiguous().view(torch.int32)
    planes = torch.split(halves, [128 * width for width in _PLANES[bits]], dim=-1)
    words = torch.cat([plane.reshape(blocks, k_tiles, 2, 128, -1) for plane in planes], dim=-1)
    words = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=-1)  # [..., thread, words, 2]
    pairs = torch.stack([(words >> (bits * field)) & (2**bits - 1) for field in range(_FIELDS[bits])], dim=-2)
    pairs = pairs.flatten(-3, -2)  # [..., thread, pairs, 2]
    if bits == 3:
        last = ((words >> 15) & 1) << torch.arange(3, device=words.device)[:, None]  # bit by bit
        pairs = torch.cat([pairs, last.sum(-2, keepdim=True, dtype=pairs.dtype)], dim=-2)
    split = pairs.to(torch.uint8).reshape(blocks, k_tiles, 2, 4, 8, 4, 4, 2, 2, 2)
    return split.permute(0, 3, 4, 8, 1, 2, 6, 7, 5, 9).reshape(blocks * N_BLOCK, k_tiles * K_TILE)


def restore(weight: TiledWeight) -> QuantizedWeight:
    """The weight in its standard layout again: the same integers, scales and zero points."""
    blocks, k_tiles, _ = weight.tiles.shape
    code_bytes = N_BLOCK * K_TILE * weight.bits // 8
    scale_bytes = 2 * N_BLOCK * K_TILE // weight.tile_group
    codes = _unpack_tiles(weight.tiles[..., :code_bytes], weight.bits)[: weight.out_features, : weight.in_features]
    width = weight.in_features if weight.group_size == -1 else weight.group_size
    keep = torch.arange(0, weight.in_features, width, device=codes.device) // weight.tile_group

    def by_group(values: Tensor) -> Tensor:
        values = values.reshape(blocks, k_tiles, -1, N_BLOCK).permute(1, 2, 0, 3).reshape(-1, blocks * N_BLOCK)
        return values[keep, : weight.out_features].contiguous()

    scales = by_group(weight.tiles[..., code_bytes : code_bytes + scale_bytes].contiguous().view(weight.scale_dtype))
    zeros = torch.full(scales.shape, weight.zero, dtype=torch.uint8, device=codes.device) if weight.zero >= 0 else None
    if zeros is None:
        zeros = by_group(weight.tiles[..., code_bytes + scale_bytes :])
    g_idx = None
    if weight.order is not None:
        position = weight.order.argsort()
        codes, g_idx = codes[:, position], position // weight.group_size
    return QuantizedWeight.from_codes(codes, scales, zeros, bits=weight.bits, group_size=weight.group_size, g_idx=g_idx)
