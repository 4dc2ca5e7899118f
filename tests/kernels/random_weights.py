"""Packed weights with random codes, scales and zero points."""

import torch

from tersor.formats.quantized_weight import QuantizedWeight


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    shuffled: bool = False,
    device: str = "cpu",
) -> QuantizedWeight:
    """`shuffled` deals the columns to groups at random, as activation order does."""
    width = in_features if group_size == -1 else group_size
    groups = -(-in_features // width)
    zeros = torch.randint(0, 2**bits, (groups, out_features), device=device)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    g_idx = None
    if shuffled:
        g_idx = torch.empty(in_features, dtype=torch.long, device=device)
        g_idx[torch.randperm(in_features, device=device)] = torch.arange(in_features, device=device) // width
    return QuantizedWeight.from_codes(
        torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, device=device),
        (torch.rand(groups, out_features, device=device) * 0.01 + 0.005).half(),
        zeros,
        bits=bits,
        group_size=group_size,
        g_idx=g_idx,
    )
