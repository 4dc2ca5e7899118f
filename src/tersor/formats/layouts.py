"""The file formats by name."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.awq import AWQ
from tersor.formats.compressed_tensors import COMPRESSED_TENSORS
from tersor.formats.gguf_layout import GGUF
from tersor.formats.gptq_layout import GPTQ_V1, GPTQ_V2
from tersor.formats.layout import BITS, Layout, QuantizationConfig
from tersor.formats.packed_weight import PackedWeight
from tersor.formats.plain import PLAIN

__all__ = ["BITS", "LAYOUTS", "PACKED_SUFFIXES", "PLAIN", "READ", "Layout", "layout_named", "layout_of", "write"]

LAYOUTS = {each.name: each for each in (GPTQ_V1, GPTQ_V2, COMPRESSED_TENSORS)}  # that hold packed weights
WRITTEN = {**LAYOUTS, PLAIN.name: PLAIN}
READ = {**LAYOUTS, AWQ.name: AWQ, GGUF.name: GGUF}  # packed weights
PACKED_SUFFIXES = tuple(dict.fromkeys(suffix for each in READ.values() for suffix in each.suffixes))


def layout_named(name: str) -> Layout:
    if name not in WRITTEN:
        raise TersorError(f"unknown format {name!r}; known: {', '.join(WRITTEN)}, auto")
    return WRITTEN[name]


def layout_of(config: QuantizationConfig, suffixes: Collection[str]) -> Layout:
    """The format of a layer: the one with these suffixes, else the one that its config names."""
    said = READ.get(config.layout, PLAIN)
    if said.suffixes[0] in suffixes:
        return said
    return next((each for each in READ.values() if not set(each.suffixes).isdisjoint(suffixes)), said)


def write(weight: PackedWeight, layout: Layout, *, sym: bool) -> dict[str, Tensor]:
    """The tensors of one layer by suffix, on the CPU."""
    assert layout.write is not None  # `layout_named` returns only layouts that can write
    return layout.write(weight.to("cpu"), sym)
