"""Packed layers in an ONNX file: their integers, with DequantizeLinear before the product (the weight half of QDQ).

    y = x W + b,   W [in, out] = DequantizeLinear(codes, scales, zeros)

8-bit integers are uint8, 4-bit ones uint4, two a byte. A step for each output is DequantizeLinear along an axis; a step for each
group of inputs is its blocked form, which opset 21 has. Columns of a group that are not neighbours (act-order) are brought
together, and x in the same order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.formats.quantized_weight import QuantizedWeight, natural_groups
from tersor.layers.experts import PackedExperts
from tersor.layers.quantized_embedding import QuantizedEmbedding
from tersor.layers.quantized_linear import QuantizedConv2d, QuantizedLinear

BITS = (4, 8)  # that a file keeps as they are
BLOCKED_SINCE = 21  # the opset in which DequantizeLinear knows blocks and 4 bits


@torch.library.custom_op("tersor::onnx_dequantize", mutates_args=())
def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, block: int) -> Tensor:
    """W [in, out] float32 from codes uint8 [in, out]. block 0: scales, zeros [out]; else [ceil(in / block), out]."""
    if block:
        rows = natural_groups(len(codes), block, codes.device)
        scales, zeros = scales[rows], zeros[rows]
    return (codes.float() - zeros.float()) * scales


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, zeros: Tensor, block: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def translations() -> dict[Any, Any]:
    """What torch.onnx makes of the op above."""
    from onnxscript import opset21 as op

    def dequantize_linear(codes: Any, scales: Any, zeros: Any, block: int) -> Any:
        if block:
            return op.DequantizeLinear(codes, scales, zeros, axis=0, block_size=block)
        return op.DequantizeLinear(codes, scales, zeros, axis=1)

    return {torch.ops.tersor.onnx_dequantize.default: dequantize_linear}


class _Weight(nn.Module):
    """A packed weight of 4 or 8 bits as the buffers that go into the file."""

    order: Tensor | None
    scales: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        codes, scales, zeros = weight.codes().t(), weight.scales.float(), weight.zeros  # [in, out], [groups, out] twice
        order = None
        if weight.g_idx is not None:
            order = torch.argsort(weight.groups(), stable=True)
            codes = codes[order]
        self.block = 0
        if len(scales) == 1:
            scales, zeros = scales[0], zeros[0]
        else:
            self.block = weight.group_size
        self.ending = "4" if weight.bits == 4 else "8"  # `pack_four_bits` knows the tensors by it
        self.register_buffer("order", order)
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer(f"codes{self.ending}", codes.contiguous())
        self.register_buffer(f"zeros{self.ending}", zeros.contiguous())

    def forward(self) -> Tensor:
        """[in, out], the inputs in `order`."""
        codes, zeros = getattr(self, f"codes{self.ending}"), getattr(self, f"zeros{self.ending}")
        found: Tensor = dequantize(codes, self.scales, zeros, self.block)
        return found


class _Linear(nn.Module):
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.matrix = _Weight(layer.packed)
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (x if self.matrix.order is None else x[..., self.matrix.order]) @ self.matrix()
        return y if self.bias is None else y + self.bias


class _Conv2d(nn.Module):
    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__()
        self.matrix, self.bias = _Weight(layer.matrix.packed), layer.bias
        self.shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix().t().reshape(self.shape)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def exportable(module: nn.Module, *, dequantize_others: bool, opset: int) -> tuple[nn.Module, dict[int, int]]:
    """A copy of the model whose packed layers can be exported, and how many layers of each number of bits stay integers.

    dequantize_others: layers that no file keeps as integers get dense float32 weights. Raises TersorError where one is met
    without that, where packed experts are met, and where an older opset has no form for a layer.
    """
    kept: dict[int, int] = {}
    found = copy.deepcopy(module)
    for name, layer in list(found.named_modules()):
        if isinstance(layer, PackedExperts):
            raise TersorError(f"{name}: packed experts have no form in ONNX; export the model that was compressed")
    inside = {f"{name}.matrix" for name, each in found.named_modules() if isinstance(each, QuantizedConv2d)}
    for name, layer in list(found.named_modules()):
        if name in inside or not isinstance(layer, QuantizedLinear | QuantizedConv2d | QuantizedEmbedding):
            continue
        if not name:
            raise TersorError("a packed layer alone is no model to export")
        weight = (layer.matrix if isinstance(layer, QuantizedConv2d) else layer).packed
        if reason := _why_not(layer, weight, opset):
            if not dequantize_others:
                raise TersorError(f"{name}: {reason}; --dequantize writes such layers as dense float32 weights")
            found.set_submodule(name, _dense(layer))
            continue
        assert not isinstance(layer, QuantizedEmbedding)
        found.set_submodule(name, _Conv2d(layer) if isinstance(layer, QuantizedConv2d) else _Linear(layer))
        kept[weight.bits] = kept.get(weight.bits, 0) + 1
    return found, kept


def _why_not(layer: nn.Module, weight: QuantizedWeight, opset: int) -> str | None:
    """Why no file keeps this layer's integers, or None."""
    if isinstance(layer, QuantizedEmbedding):
        return "a packed embedding would be unpacked as a whole at every call"
    if weight.bits not in BITS:
        return f"integers of {weight.bits} bits have no form in ONNX, only those of 4 and 8"
    if weight.a_bits is not None:
        return "its inputs are rounded token by token, which the file would not do"
    if weight.g_idx is not None:
        groups = weight.groups()
        if not torch.equal(groups.sort().values, natural_groups(weight.in_features, weight.group_size)):
            return "its groups have different sizes"
    if opset < BLOCKED_SINCE and (weight.bits == 4 or len(weight.scales) > 1):
        return f"opset {opset} knows neither 4 bits nor groups, which {BLOCKED_SINCE} does"
    return None


def _dense(layer: QuantizedLinear | QuantizedConv2d | QuantizedEmbedding) -> nn.Module:
    """The layer as it was before, with the values that its integers stand for."""
    if isinstance(layer, QuantizedEmbedding):
        if layer.embed_scale is not None:
            raise TersorError("a packed embedding that scales its rows has no form in ONNX")
        embedding = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
        embedding.weight.data = layer.packed.dequantize(torch.float32)
        return embedding
    if isinstance(layer, QuantizedConv2d):
        conv_of: Any = nn.Conv2d  # whose types want pairs, where the layer holds tuples
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        conv: nn.Conv2d = conv_of(layer.in_channels, layer.out_channels, *sizes, bias=layer.bias is not None)
        conv.weight.data = layer.matrix.packed.dequantize(torch.float32).view_as(conv.weight)
        if layer.bias is not None:
            conv.bias = layer.bias
        return conv
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = layer.packed.dequantize(torch.float32)
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    return linear


def pack_four_bits(proto: Any) -> None:
    """Turn the uint8 tensors of 4-bit layers in an onnx.ModelProto into uint4, two a byte, the first in the low half."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    names = {
        name
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear"
        for name in (node.input[0], node.input[2])
        if name.endswith(("codes4", "zeros4"))
    }
    for tensor in proto.graph.initializer:
        if tensor.name not in names:
            continue
        codes = numpy_helper.to_array(tensor).reshape(-1)
        if len(codes) % 2:
            codes = np.append(codes, np.uint8(0))
        packed = TensorProto(name=tensor.name, data_type=TensorProto.UINT4, dims=list(tensor.dims))
        packed.raw_data = (codes[0::2] | (codes[1::2] << 4)).tobytes()
        tensor.CopyFrom(packed)
    for value in proto.graph.value_info:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.UINT4
