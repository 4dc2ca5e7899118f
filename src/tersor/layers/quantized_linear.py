"""A linear layer with a weight of packed integers, whatever the file format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.formats.packed_weight import PackedWeight
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels.quantized_matmul import PreparedWeight, prepare, quantized_matmul, restore
from tersor.layers.experts import ExpertMap, PackedExperts
from tersor.layers.linear_map import LinearMap
from tersor.layers.quantized_embedding import quantized_embedding


class QuantizedLinear(nn.Module):
    """Drop-in for nn.Linear (and transformers' Conv1D): x [..., in] -> [..., out] in x's dtype."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    bias: Tensor | None
    like: Tensor  # empty; the dtype of `weight`, which follows the module's casts

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: of the dense weight that it replaces; models that cast their inputs look at it."""
        super().__init__()
        self.bits, self.group_size, self.in_features = weight.bits, weight.group_size, weight.in_features
        self.a_bits = weight.a_bits
        self.out_features = weight.out_features
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("g_idx", weight.g_idx)
        self.register_buffer("bias", bias)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.qweight.device), persistent=False)
        self.prepared: PreparedWeight | None = None

    def prepare(self) -> bool:
        """Repack for the kernel of the layer's device, and let the standard layout go. Call it where the layer will run.

        Returns False, and changes nothing, where the device has no kernel for this weight.
        """
        if self.prepared is not None:
            return True
        prepared = prepare(self.packed)
        if isinstance(prepared, QuantizedWeight):
            return False
        self.prepared = prepared
        self.qweight = self.scales = self.zeros = self.g_idx = None  # type: ignore[assignment]
        return True

    def restore(self) -> None:
        """Back to the standard layout. Moving or casting the module does this by itself."""
        if self.prepared is not None:
            weight, self.prepared = self.packed, None
            self.qweight, self.scales, self.zeros = weight.qweight, weight.scales, weight.zeros
            self.g_idx = weight.g_idx

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared is not None:
            weight = self.packed
            tensors = {"qweight": weight.qweight, "scales": weight.scales, "zeros": weight.zeros, "g_idx": weight.g_idx}
            destination.update({prefix + name: tensor for name, tensor in tensors.items() if tensor is not None})

    @property
    def packed(self) -> QuantizedWeight:
        """The weight in its standard layout, also where the layer holds another."""
        if self.prepared is not None:
            return restore(self.prepared)
        return QuantizedWeight(
            self.qweight,
            self.scales,
            self.zeros,
            self.g_idx,
            self.bits,
            self.group_size,
            self.in_features,
            self.a_bits,
        )

    def put(self, weight: QuantizedWeight) -> None:
        """Take another weight of the same shape and grid."""
        self.prepared = None
        self.qweight, self.scales, self.zeros, self.g_idx = weight.qweight, weight.scales, weight.zeros, weight.g_idx

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in]; a new tensor at every access, for code that only looks at it."""
        return self.packed.dequantize(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = quantized_matmul(x, self.packed if self.prepared is None else self.prepared)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        rounded = "" if self.a_bits is None else f", a_bits={self.a_bits}"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}{rounded}"


class QuantizedConv2d(nn.Module):
    """Drop-in for nn.Conv2d with a packed weight [out, in·kh·kw]: x [b, in, h, w] -> [b, out, h', w']."""

    def __init__(self, weight: QuantizedWeight, conv: nn.Conv2d) -> None:
        super().__init__()
        self.matrix = QuantizedLinear(weight)
        self.bias = conv.bias
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, 1

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix.packed.dequantize(x.dtype).view(self.out_channels, self.in_channels, *self.kernel_size)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def quantized_layer(layer: nn.Module, weight: QuantizedWeight) -> nn.Module:
    """The packed module to put in place of a linear map or an embedding."""
    if isinstance(layer, nn.Embedding):
        return quantized_embedding(layer, weight)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(weight, layer)
    dense, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    assert isinstance(dense, Tensor)
    return QuantizedLinear(weight, bias if isinstance(bias, Tensor) else None, dtype=dense.dtype)


def packed_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed linear layers that are called, by the names of the linear maps that they replaced. A layer with several names
    comes once. Packed convolutions are not among them."""
    inside = {id(each.matrix) for each in model.modules() if isinstance(each, QuantizedConv2d)}
    found: dict[str, QuantizedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            mine = {f"{name}.{n}": each for n, each in enumerate(module.linears) if isinstance(each, QuantizedLinear)}
            found |= mine
            inside |= set(map(id, mine.values()))
        elif isinstance(module, QuantizedLinear) and id(module) not in inside:
            found[name] = module
    return found


def prepare_layers(model: nn.Module) -> None:
    """Repack every packed layer for the kernel of its device. Packed convolutions keep the standard layout: they unpack their
    weight at every call."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, QuantizedLinear) and not isinstance(module, QuantizedConv2d):
                child.prepare()


def place_packed(model: nn.Module, maps: Mapping[str, LinearMap], packed: Mapping[str, PackedWeight]) -> None:
    """Put packed layers in place of the maps with these names. An expert stack is replaced as a whole. Plain numbers are
    skipped: the maps hold them already."""
    stacks: dict[str, dict[int, QuantizedWeight]] = defaultdict(dict)
    for name, weight in packed.items():
        found = maps[name]
        if not isinstance(weight, QuantizedWeight):
            continue
        if isinstance(found, ExpertMap):
            stacks[name.rpartition(".")[0]][found.index] = weight
        else:
            model.set_submodule(name, quantized_layer(found, weight))
    for name, experts in stacks.items():
        first = maps[f"{name}.0"]
        assert isinstance(first, ExpertMap)
        count = getattr(first.owner, first.stack).shape[0]
        if len(experts) != count:
            raise TersorError(
                f"{name}: only {len(experts)} of {count} experts are quantized; all of a stack or none can be"
            )
        dtype = getattr(first.owner, first.stack).dtype
        del first.owner._parameters[first.stack]
        layers = [QuantizedLinear(experts[n], dtype=dtype) for n in range(count)]
        first.owner.add_module(first.stack, PackedExperts(layers, transposed=first.transposed))
