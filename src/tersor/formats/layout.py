"""What a file format says of itself: how a layer is written, read and checked, what its config says, which layers it takes.

A format is one file beside this one, whose functions are put together in a `Layout`; `layouts.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import Stored
from tersor.formats.packed_weight import PackedWeight
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.untrusted import matches

Header = tuple[str, tuple[int, ...]]  # dtype, as safetensors calls it, and shape
LAYER_KEYS = ("bits", "group_size", "sym", "desc_act")  # options that may differ from layer to layer
BITS = (2, 3, 4, 8)  # all formats and their readers take these


@dataclass(frozen=True)
class UniformGrids:
    """The grids of a layer, as a method describes them."""

    bits: int  # of a code in a file
    group_size: int  # columns that share a step and a zero point; -1: whole rows
    sym: bool
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = False
    damp: float = 0.01
    a_bits: int | None = None  # to which the inputs are rounded, token by token; None: they are not

    def groups(self, columns: int) -> int:
        """How many groups a row of so many columns has."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def of_layer(self) -> dict[str, Any]:
        return {key: asdict(self)[key] for key in LAYER_KEYS}


@dataclass(frozen=True)
class Description:
    """What a compressed checkpoint says of its layers, by their names on disk."""

    grids: UniformGrids  # of most layers
    overrides: Mapping[str, UniformGrids]  # of those that differ
    ignored: Sequence[str]  # linear layers that are left as they were
    ignored_in_blocks: Sequence[str]  # those of them that lie in the repeated blocks
    in_block: Sequence[str]  # the packed layers of the first block, by their names within it
    head: bool  # whether the output head is packed
    embeddings: bool  # whether the token embedding is packed
    version: str  # of tersor


@dataclass(frozen=True)
class QuantizationConfig:
    """What a checkpoint's config says of its packed layers."""

    layout: str  # the name of a `Layout`
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    a_bits: int | None = None  # to which inputs are rounded, token by token
    whole_word_zeros: bool = False  # see `gptq_layout.read`
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # by target: a name, a class, or "re:" and a pattern

    def for_layer(self, *names: str, classes: Sequence[str] = ("Linear",)) -> QuantizationConfig:
        """What holds for one layer. names: its published name and its module's. classes: of the module.

        A target that is a name wins over regular expressions, and these win over classes. Of regular expressions the first that
        matches wins.
        """
        patterns = [(target.removeprefix("re:"), changes) for target, changes in self.overrides if _is_pattern(target)]
        exact = [(target, changes) for target, changes in self.overrides if not _is_pattern(target)]
        found = [changes for target, changes in exact if target in names]
        found += [changes for pattern, changes in patterns if any(matches(pattern, name) for name in names)]
        found += [changes for target, changes in exact if target in classes]
        return replace(self, **found[0]) if found else self


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


@dataclass(frozen=True)
class Layout:
    """A file format. Formats that are only read have no `write`."""

    name: str
    suffixes: tuple[str, ...]  # of a layer's tensors
    method: str  # `quant_method` in a checkpoint's config; empty for plain numbers, which have none
    # read(published name, tensors by suffix, inputs, what holds for the layer)
    read: Callable[[str, Mapping[str, Tensor], int, QuantizationConfig], PackedWeight]
    # check(published name, headers by suffix, inputs, what holds for the layer): raises TersorError naming a tensor
    check: Callable[[str, Mapping[str, Header], int, QuantizationConfig], None]
    parse: Callable[[Mapping[str, Any]], QuantizationConfig]  # a `quantization_config`
    write: Callable[[Any, bool], dict[str, Tensor]] | None = None  # write(weight, sym)
    # sizes(rows, columns, grids, dtype of the steps): the bytes of what `write` gives of a packed layer, by suffix
    sizes: Callable[[int, int, UniformGrids, torch.dtype], dict[str, int]] | None = None
    config: Callable[[Description], dict[str, Any]] | None = None  # the `quantization_config`; None: it needs none
    config_beside: str | None = None  # a file beside config.json in which older readers look for the same

    # What it accepts.
    scale_dtype: torch.dtype | None = None  # precision of the steps; None means the model's own
    min_zero: int = 0  # the smallest zero point that every reader understands
    word_columns: int = 1  # inputs come in multiples of it, which fill whole words; 1 where the format pads
    word_rows: int = 1  # the same for outputs
    embeddings: bool = True  # whether other readers know packed embeddings
    conv1d: bool = True  # whether other readers find packed Conv1D layers
    scattered_groups: bool = True  # whether a group may hold columns from anywhere
    expert_stacks: bool = True  # whether other readers find experts that one parameter of the model holds

    def stored(self, dtype: torch.dtype) -> Stored:
        """What it keeps of a grid. dtype: the model's own."""
        return Stored(self.scale_dtype or dtype, self.min_zero)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """The size of a layer that fills no whole words, such as "80 outputs"; None where the layer fits."""
        if in_features % self.word_columns:
            return f"{in_features} inputs"
        return f"{out_features} outputs" if out_features % self.word_rows else None

    @property
    def is_plain(self) -> bool:
        """Whether the numbers are written as the model has them."""
        return not self.method


# Checks that all readers share. Each raises TersorError naming the tensor that does not fit.


def check_dtypes(name: str, headers: Mapping[str, Header], allowed: Mapping[str, tuple[str, ...]]) -> None:
    for suffix, (dtype, _) in headers.items():
        if suffix in allowed and dtype not in allowed[suffix]:
            raise TersorError(f"{name}.{suffix} is of the dtype {dtype}; {' or '.join(allowed[suffix])} is expected")


def check_shape(
    name: str,
    suffix: str,
    headers: Mapping[str, Header],
    allowed: Sequence[tuple[int, ...]],
    in_features: int,
    config: QuantizationConfig,
) -> None:
    if suffix in headers and headers[suffix][1] not in allowed:
        claimed = f"{in_features} inputs at {config.bits} bits in groups of {config.group_size}"
        shapes = " or ".join(map(str, allowed))
        raise TersorError(f"{name}.{suffix} is {headers[suffix][1]}; {claimed}, as the config says, need {shapes}")


def groups_of(in_features: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-in_features // group_size)


def require(name: str, tensors: Mapping[str, Tensor], suffixes: Sequence[str]) -> None:
    for suffix in suffixes:
        if suffix not in tensors:
            raise TersorError(f"the checkpoint lacks {name}.{suffix}")


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise TersorError(f"{name} is {tuple(tensor.shape)}; expected {shape}")


def expect_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise TersorError(f"{name} is {tuple(tensor.shape)}; expected a matrix")


def group_size_that_fits(name: str, groups: int, in_features: int, claimed: int, g_idx: Tensor | None) -> int:
    for size in (claimed, in_features // groups):
        if -(-in_features // (in_features if size == -1 else max(size, 1))) == groups:
            return size
    if g_idx is not None:  # every column says its group: the size is only a label
        return -(-in_features // groups)
    raise TersorError(f"{name} holds {groups} groups, which {in_features} inputs do not divide into")


def checked_groups(name: str, g_idx: Tensor, groups: int) -> Tensor:
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise TersorError(f"{name} reaches from {low} to {high}; the layer has {groups} groups")
    return g_idx.to(torch.int32)


def checked_weight(
    scales_name: str,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> QuantizedWeight:
    bad = ~torch.isfinite(scales.float()) | (scales == 0)  # AutoRound writes negative steps too
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
