"""BCT: a whole transformer in small blocks of integers with power-of-two shifts, without data, tuning or retraining.

What it is for: machines that have only integers and shifts. Weights and everything that is computed between them take 8 bits or
fewer, at once and without a calibration sample. A block of 64 numbers with a shift of its own loses far less than one scale for
a layer. Here floating-point units compute the integers, exactly (layers/block_arithmetic.py), so nothing runs faster. If only
the weights must be small, GPTQ (`tersor quantize`) loses less.

    tersor compress bct MODEL --w-bits 8 --out small
    tersor compress bct MODEL --w-bits 4 --block 64 --block-rows 16 --out smaller     # N = 1024: 7.98 times

    result = tersor.compress(model, BCT())

    e = the largest shift with max|x| 2^e <= 2^(b-1) - 1,  q = round(x 2^e),  x̂ = q 2^-e       (formats/blocks.py)

In blocks are:

- weights, in tiles of `block` inputs by `block_rows` outputs; embeddings and position tables; biases, γ and β (8 bits, or
  `w_bits` where that is more);
- the inputs of every linear layer and of every product of activations, along the axis that is summed over, so that tiles are
  multiplied as integers;
- the inputs of GELU and other activation functions, which are tables, and of norms, whose sums are sums of integers;
- scores, with one shift a row; their exponentials are a table of integers;
- both terms of residual sums and of gates.

Shifts of activations are fitted to each input. A number takes b + 8/N bits on disk, N = block · block_rows; compared with 32
bits that is a factor of 32/(b + 8/N).

No code was published, and the paper gives only the idea of each operator. Our choices: numbers are put into blocks where they
are read, not where they are written; sums of tiles are floating; the softmax's result has its block's own shift, not b - 1;
scores that a mask hides are left out of the blocks and become 0. Not in blocks: convolutions, tokens that are bare parameters
(a vision transformer's class token), operations outside the repeated blocks that are no layers, and activation functions that
are written out in elementary steps. A head that is tied to the embedding is stored apart from it.

Origin: arXiv 2304.01483 (Dong, Chen, 2023) and its predecessor BBCT, arXiv 2303.09184; no code. Written from a description.

Proven: the error bound, invariance under powers of two, idempotence and the other properties that follow from the definition;
integer products equal to floating ones exactly; size on disk; similarities of a sentence encoder (all-MiniLM-L6-v2: Spearman
with the original's above 0.99 at 8 bits, tests/methods/test_bct.py). Not proven: GLUE scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.blocks import find_units
from tersor.errors import TersorError
from tersor.layers.block_map import BlockMap
from tersor.layers.block_norm import BlockNorm
from tersor.layers.block_rows import BlockRows
from tersor.layers.block_scope import BlockScope
from tersor.layers.linear_map import computes_its_own, embeddings, linear_maps, weight_matrix
from tersor.layers.quantized_embedding import why_not_packed
from tersor.methods.method import Method, ModelMethod, Report, Work, option, register

EPS = ("eps", "variance_epsilon")


@dataclass(frozen=True)
class BlockPart(Report):
    """One row."""

    what: str  # "linear", "table", "norm", or "scope" for a part whose arithmetic is on blocks
    bits: str  # as in W8A8
    error: float  # ‖x̂ - x‖² / ‖x‖² of the weights
    note: str = ""


@register
@dataclass(frozen=True)
class BCT(ModelMethod):
    """Put weights and all intermediate results into small blocks of integers with a shift, without data."""

    name: ClassVar[str] = "bct"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-integer",
        "practical/quantization",
    )
    needs_samples: ClassVar[bool] = False

    w_bits: int = option(8, "bits a weight", least=2, most=8)
    a_bits: int = option(8, "bits an activation", least=2, most=8)
    block: int = option(64, "numbers of one row that share a shift; 0: one shift for a whole tensor", least=0)
    block_rows: int = option(1, "outputs of a layer, or rows of a table, that share a shift", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.block and self.block_rows != 1:
            raise TersorError(
                f"block=0 is one shift for a whole tensor, so block_rows={self.block_rows} has no meaning"
            )

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(w_bits=bits)] for bits in (8, 4)] if kind == "image" else []

    @property
    def rows(self) -> int:
        """Rows of a tile of weights; 0: all."""
        return self.block_rows if self.block else 0

    @torch.no_grad()
    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        named = dict(model.named_modules())
        order = {name: n for n, name in enumerate(named)}
        scopes = [name for name in scopes_of(model) if _wants(name, named[name], work.wanted)]
        rows = [*self._layers(model, work), *self._norms(model, named, work)]
        if not any(row.what for row in rows):
            raise TersorError(f"{type(model).__name__} has nothing that can be put into blocks")
        for name in scopes:
            if not any(
                isinstance(each, BlockMap | BlockRows | BlockNorm) for each in model.get_submodule(name).modules()
            ):
                continue
            model.set_submodule(name, BlockScope(model.get_submodule(name), bits=self.a_bits, columns=self.block))
            rows.append(BlockPart(name, "scope", f"A{self.a_bits}", 0.0))
        config: Any = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # the head's blocks are stored apart
        for row in sorted(rows, key=lambda row: order.get(row.name, 0)):
            work.report(row)
        return model

    def _layers(self, model: nn.Module, work: Work) -> list[BlockPart]:
        rows = []
        for name, module in {**linear_maps(model), **embeddings(model)}.items():
            if not work.wanted(name):
                continue
            if why := _why_not(module):
                rows.append(BlockPart(name, "", "", 0.0, f"left as it is: {why}"))
                continue
            assert isinstance(module, nn.Module)
            bias, weight = getattr(module, "bias", None), module.weight
            if isinstance(module, nn.Embedding):
                table = BlockRows(module, bits=self.w_bits, rows=self.rows, columns=self.block)
                rows.append(BlockPart(name, "table", f"W{self.w_bits}", table.table.fill(module.weight)))
                model.set_submodule(name, table)
                continue
            assert isinstance(weight, Tensor)
            shape = {"rows": self.rows, "columns": self.block}
            linear = BlockMap(module, bits=self.w_bits, a_bits=self.a_bits, **shape, bias=bias is not None)
            rows.append(
                BlockPart(name, "linear", f"W{self.w_bits}A{self.a_bits}", linear.fill(weight_matrix(module), bias))
            )
            model.set_submodule(name, linear)
        return rows

    def _norms(self, model: nn.Module, named: dict[str, nn.Module], work: Work) -> list[BlockPart]:
        rows = []
        for name, module in named.items():
            if "Norm" not in type(module).__name__ or not work.wanted(name):
                continue
            eps = next((getattr(module, each) for each in EPS if isinstance(getattr(module, each, None), float)), None)
            center = None if eps is None else kind_of_norm(module, eps)
            if eps is None or center is None:
                if any(True for _ in module.parameters(recurse=False)):
                    rows.append(
                        BlockPart(name, "", "", 0.0, f"left as it is: {type(module).__name__} is no plain norm")
                    )
                continue
            bias, weight = getattr(module, "bias", None), module.weight
            assert isinstance(weight, Tensor)
            made = BlockNorm(
                module, a_bits=self.a_bits, columns=self.block, eps=eps, center=center, bias=bias is not None
            )
            rows.append(BlockPart(name, "norm", f"W8A{self.a_bits}", made.fill(weight, bias)))
            model.set_submodule(name, made)
        return rows


def scopes_of(model: nn.Module) -> list[str]:
    """The repeated blocks, and outside them the modules around layers that hold no block: embeddings, a pooler."""
    units = find_units(model)
    blocks = [unit.name for unit in units if unit.is_block]
    found = dict.fromkeys(blocks)
    for unit in units:
        parent = unit.name.rpartition(".")[0]
        if unit.is_block or not parent or any(block.startswith(f"{parent}.") for block in blocks):
            continue
        found[parent] = None
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


@torch.no_grad()
def kind_of_norm(module: nn.Module, eps: float) -> bool | None:
    """Whether a norm subtracts the mean, found by running it; None where it computes something else."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.device.type == "meta":
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) * 2 + 1
    try:
        wanted = module(x).double()
    except (RuntimeError, TypeError, ValueError, IndexError):  # the module takes other inputs
        return None
    wide, close = x.double(), torch.finfo(weight.dtype).eps * 32
    for center in (True, False):
        moved = wide - wide.mean(-1, keepdim=True) if center else wide
        y = moved * (moved.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
        y = y if bias is None else y + bias.double()
        if wanted.shape == y.shape and torch.allclose(wanted, y, rtol=close, atol=close * float(y.abs().max())):
            return center
    return None


def _why_not(module: Any) -> str | None:
    if not isinstance(module, nn.Module):
        return "an expert of a stack"
    if isinstance(module, nn.Conv2d):
        return "a convolution"
    if isinstance(module, nn.Embedding):
        return why_not_packed(module)
    if computes_its_own(module):
        return f"{type(module).__name__} computes in a way of its own"
    return None


def _wants(name: str, module: nn.Module, wanted: Callable[[str], bool]) -> bool:
    """Whether the user asked for any layer in a part."""
    return any(wanted(f"{name}.{inner}") for inner in linear_maps(module)) or wanted(name)
