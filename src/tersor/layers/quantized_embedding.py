"""An embedding whose table is packed integers. A call unpacks only the rows that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.linear_map import computes_its_own


class QuantizedEmbedding(nn.Module):
    """Drop-in for nn.Embedding: ids [...] -> [..., hidden], in the dtype of the table that it replaces.

    embed_scale: a factor of the rows, as transformers' scaled embeddings have it; None: none.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    embed_scale: Tensor | float | None
    like: Tensor  # empty; the dtype of the rows, which follows the module's casts

    def __init__(
        self, weight: QuantizedWeight, *, embed_scale: Tensor | float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.num_embeddings, self.embedding_dim = weight.out_features, weight.in_features
        # The shapes are those of any packed weight, but in memory the numbers of one token lie side by side.
        self.register_buffer("qweight", weight.qweight.t().contiguous().t())
        self.register_buffer("scales", weight.scales.t().contiguous().t())
        self.register_buffer("zeros", weight.zeros.t().contiguous().t())
        self.register_buffer("g_idx", weight.g_idx)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.qweight.device), persistent=False)
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    @property
    def packed(self) -> QuantizedWeight:
        return QuantizedWeight(
            self.qweight, self.scales, self.zeros, self.g_idx, self.bits, self.group_size, self.embedding_dim
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized table [tokens, hidden]; a new tensor at every access, for code that only looks at it."""
        return self.packed.dequantize(self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.packed.take_rows(input.flatten()).dequantize(self.like.dtype)
        return scaled(rows.contiguous().view(*input.shape, self.embedding_dim), self.embed_scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


def scaled(rows: Tensor, embed_scale: Tensor | float | None) -> Tensor:
    """Rows times the scale, in the rows' dtype: a scale that is a tensor is rounded to it first, as transformers does."""
    if embed_scale is None:
        return rows
    return rows * (embed_scale.to(rows.dtype) if isinstance(embed_scale, Tensor) else embed_scale)


def why_not_packed(layer: nn.Embedding) -> str | None:
    """The reason why an embedding cannot be packed: it does more than look rows up and scale them. None where it can."""
    scale = getattr(layer, "embed_scale", None)
    if (
        computes_its_own(layer)
        and not isinstance(scale, float | int)
        and not (isinstance(scale, Tensor) and scale.dim() == 0)
    ):
        return f"is a {type(layer).__name__}, which does more than look up rows and scale them"
    if layer.max_norm is not None:
        return f"shortens its rows to max_norm={layer.max_norm:g} when they are looked up"
    return None


def scale_of(layer: nn.Embedding) -> Tensor | float | None:
    """The factor of the rows of an embedding that can be packed."""
    scale: Tensor | float | None = getattr(layer, "embed_scale", None)
    return scale if computes_its_own(layer) else None


def looks_up(layer: nn.Embedding, ids: Tensor, output: object) -> bool:
    """Whether `output` is the rows of an embedding for these ids, times its scale."""
    if ids.is_floating_point() or not isinstance(output, Tensor):
        return False
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < layer.num_embeddings:
        return False
    expected = scaled(nn.functional.embedding(ids, layer.weight), scale_of(layer))
    alike = output.shape == expected.shape and output.dtype == expected.dtype
    return alike and torch.allclose(output, expected, 1e-3, 1e-4)


def quantized_embedding(layer: nn.Embedding, weight: QuantizedWeight) -> QuantizedEmbedding:
    """The packed module to put in place of an embedding. Raises TersorError where the embedding cannot be packed."""
    if reason := why_not_packed(layer):
        raise TersorError(f"an embedding that is packed {reason}")
    return QuantizedEmbedding(weight, embed_scale=scale_of(layer), dtype=layer.weight.dtype)
