"""Linear maps as the CPU's kernel streams them, in the place of those of a model that runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear


class PreparedLinear(nn.Module):
    """A linear map whose weight lies as the CPU's kernel streams it: x [..., in] -> [..., out], both float32.

    Activations are rounded to bfloat16 where the processor multiplies that type. Elsewhere, before packed weights, they are
    rounded to 16-bit fixed point, which is closer, and twice as fast as float32.
    """

    def __init__(self, weight: cpu.PanelWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight_in_panels = weight
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._to_bf16 = weight.implementation in cpu.BF16
        self._round = weight.bits in cpu.QUANTIZED

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16() if self._to_bf16 else x
        y = cpu.matmul(x, self.weight_in_panels, round_x=self._round).float()
        return y if self.bias is None else y + self.bias


def prepare_linears(module: nn.Module) -> None:
    """Exchange those linear maps of a float32 module on a CPU that are packed, or whose values bfloat16 holds exactly."""
    if cpu.choose()[0] is None or any(each.dtype != torch.float32 for each in module.parameters()):
        return
    for name, each in list(module.named_modules()):
        if isinstance(each, QuantizedLinear) and isinstance(each.prepared, cpu.PanelWeight):
            module.set_submodule(name, PreparedLinear(each.prepared, each.bias))
        elif type(each) is nn.Linear and torch.equal(each.weight, each.weight.bfloat16().float()):
            module.set_submodule(name, PreparedLinear(cpu.prepare_dense(each.weight), each.bias))
