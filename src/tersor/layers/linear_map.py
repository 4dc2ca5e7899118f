"""Every kind of linear map seen as one: y = W x with W a matrix [out, in].

nn.Linear holds W as it is, transformers' Conv1D holds its transpose, nn.Conv2d is a linear map of image patches
[out, in·kh·kw], and an expert may be a slice of a fused parameter (`experts.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import round_tokens
from tersor.formats.packed_weight import PackedWeight
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.experts import ExpertMap, expert_maps

LinearMap = nn.Module | ExpertMap


def linear_maps(module: nn.Module) -> dict[str, LinearMap]:
    """The dense linear maps inside `module` by name, in tree order. A map with several names comes once."""
    found: dict[str, LinearMap] = {}
    for name, each in module.named_modules():
        if is_linear_map(each):
            found[name] = each
        found |= {f"{name}.{expert}" if name else expert: m for expert, m in expert_maps(each).items()}
    return found


def embeddings(module: nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings inside `module` by name. A table [tokens, hidden] is packed like the weight of a linear map whose outputs
    are the tokens."""
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Embedding)}


def packable_maps(module: nn.Module) -> dict[str, LinearMap]:
    """The linear maps and the embeddings: all that may be stored packed."""
    return {**linear_maps(module), **embeddings(module)}


def is_linear_map(module: nn.Module) -> bool:
    """Whether `module` is a dense linear map whose weight tersor can see as a matrix (a grouped convolution is not)."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight without calling it
    return isinstance(module, nn.Linear) or is_conv1d(module)


def computes_its_own(module: LinearMap) -> bool:
    """Whether the class has a forward of its own: then only running it shows what it computes."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is not nn.Embedding.forward
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def columns_of(module: LinearMap) -> int:
    """How many inputs one output of a linear map sees: the columns of its weight matrix."""
    return weight_matrix(module).shape[1]


def weight_matrix(module: LinearMap) -> Tensor:
    """The weight as [out, in]: nn.Linear as it is, transformers' Conv1D transposed, Conv2d [out, in·kh·kw]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_matrix(module, weight)


def matrix_shape(module: LinearMap) -> tuple[int, int]:
    """(out, in) of the weight seen as a matrix."""
    rows, columns = weight_matrix(module).shape
    return rows, columns


def set_weight_matrix(module: LinearMap, matrix: Tensor) -> None:
    """Put a matrix [out, in] back into the module's own weight layout and dtype, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(own_layout(module, matrix))


def put_packed(module: LinearMap, weight: PackedWeight, dtype: torch.dtype | None = None) -> None:
    """Let a dense layer compute what the packed one will: its numbers, with inputs rounded where the packed weight says so."""
    set_weight_matrix(module, weight.dequantize(dtype))
    if isinstance(weight, QuantizedWeight) and weight.a_bits is not None:
        round_inputs(module)


def round_inputs(module: LinearMap) -> None:
    """From now on a layer rounds its inputs to 8 bits, token by token."""
    assert isinstance(module, nn.Module)  # methods take no experts that lie in one tensor
    if _round_first not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_round_first)


def _round_first(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return round_tokens(args[0]), *args[1:]


def own_layout(module: LinearMap, matrix: Tensor) -> Tensor:
    """Rows of a weight matrix [n, in] in the layout of the module and of its file."""
    if _holds_transpose(module):
        return matrix.t()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return matrix.view(-1, *weight.shape[1:])


def as_matrix(module: LinearMap, held: Tensor) -> Tensor:
    """Inverse of `own_layout`: [n, in]."""
    return held.t() if _holds_transpose(module) else held.flatten(1)


def input_matrix(module: LinearMap, x: Tensor) -> tuple[Tensor, int]:
    """The matrix that the module multiplies its weight matrix with, [tokens, in], and how many samples it holds.

    A linear map's samples are its leading axis (sequences, not tokens); x without a batch axis is one sample.
    """
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        unfolded = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return unfolded.transpose(1, 2).flatten(0, 1), x.shape[0]  # [b, in·kh·kw, L] -> [b·L, in·kh·kw]
    samples = x.shape[0] if x.dim() > 2 else 1
    return x.reshape(-1, x.shape[-1]), samples


def window_of(module: LinearMap) -> tuple[object, ...]:
    """Which part of the input a row of `input_matrix` holds. Two maps with equal windows make the same matrix of one input."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.dilation)


def call_with_matrix(module: LinearMap, x: Tensor, matrix: Tensor) -> Tensor:
    """What the module would compute of x with this weight matrix [out, in]."""
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    if isinstance(module, nn.Conv2d):
        kernel = matrix.view_as(module.weight)
        return nn.functional.conv2d(x, kernel, bias, module.stride, module.padding, module.dilation, module.groups)
    return nn.functional.linear(x, matrix, bias)


def is_conv1d(module: LinearMap) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with weight [in, out]. Tested by name, so as not to import
    transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _holds_transpose(module: LinearMap) -> bool:
    return module.transposed if isinstance(module, ExpertMap) else is_conv1d(module)
