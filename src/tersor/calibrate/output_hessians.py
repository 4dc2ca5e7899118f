"""What errors in the outputs of each linear map cost the model's predictions, to second order, from one backward pass.

    H_O = mean over tokens of g gᵀ [out, out]        g = ∂ℓ/∂y at an output y of the map

For predictions ℓ is the negative log-likelihood of labels that are drawn from the model's own distribution, so H_O is the output
factor of the Fisher matrix, which is the second derivative of the KL divergence from the model to a changed one (Martens and
Grosse: "K-FAC", ICML 2015, arXiv 1503.05671; section 3). Other outputs o count by their squared error: ℓ = ⟨o, ε⟩ with ε normal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor, predicts
from tersor.errors import NotFiniteError, TersorError
from tersor.progress import Progress

SEED = 0  # of the drawn labels


def gather_output_hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], progress: Progress
) -> dict[str, Tensor]:
    """H_O of each layer in float32, in main memory, scaled to a mean diagonal of 1. A layer that no gradient reaches has none.

    model: its parameters need no gradients. One batch's activations and gradients are held at a time, beside all sums. Raises
    NotFiniteError, naming the layer, where a gradient is not finite.
    """
    chance = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
    totals: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def after(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output + output.new_zeros(()).requires_grad_()

            def note(gradient: Tensor) -> None:
                g = (gradient.movedim(1, -1) if isinstance(module, nn.Conv2d) else gradient).flatten(0, -2).float()
                if name not in totals:
                    totals[name] = g.new_zeros(g.shape[-1], g.shape[-1])
                totals[name].addmm_(g.t(), g)

            output.register_hook(note)  # type: ignore[no-untyped-call]
            return output

        return after

    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(watch(name)).remove)
        for n, batch in enumerate(batches):
            made = call(model, batch)
            output = first_tensor(made)
            if output is None or not output.requires_grad:
                raise TersorError(f"{type(model).__name__} gives no output that its layers could be judged by")
            output.backward(_drawn(output.detach(), predicts(model, made), chance).to(output.dtype))  # type: ignore[no-untyped-call]
            progress("what outputs cost", n + 1, len(batches))
    found = {}
    for name, total in totals.items():
        mean = total.diagonal().mean()
        if not bool(torch.isfinite(total).all()):
            raise NotFiniteError(f"the gradient of {name} is not finite (NaN or Inf): use --dtype float32")
        if float(mean) > 0:
            found[name] = (total / mean).cpu()
    return found


def _drawn(output: Tensor, predictions: bool, chance: torch.Generator) -> Tensor:
    """∂ℓ/∂output for one draw."""
    if not predictions:
        return torch.randn(output.shape, generator=chance, device=output.device)
    gradient = output.float().softmax(-1)
    rows = gradient.flatten(0, -2)
    labels = torch.multinomial(rows, 1, generator=chance)
    rows.scatter_add_(-1, labels, rows.new_full(labels.shape, -1.0))
    return rows.view_as(output)
