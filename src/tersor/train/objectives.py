"""What a model is trained for: small functions (model, batch) -> {"loss": scalar, and what else is worth reporting}.

A batch is forward's keyword arguments by name, and under "target" what they should give. Which objective a model has
follows from the task that it is registered with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


def forecasting(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Mean squared error of the forecast (B, H, N) over all samples, steps and variates."""
    inputs, target = _split(batch)
    forecast = _only(model(**inputs)).float()
    return {"loss": F.mse_loss(forecast, target), "mae": F.l1_loss(forecast, target)}


def classification(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the logits (B, classes) with class numbers (B,)."""
    inputs, target = _split(batch)
    logits = _only(model(**inputs)).float()
    return {"loss": F.cross_entropy(logits, target), "accuracy": (logits.argmax(-1) == target).float().mean()}


def language_modelling(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of token t + 1 given the tokens up to t: logits (B, L, V) of input_ids (B, L)."""
    logits = _only(model(**batch)).float()[:, :-1]
    return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())}


OBJECTIVES: dict[str, Objective] = {
    "forecast": forecasting,
    "classify": classification,
    "language-model": language_modelling,
}


def objective_for(task: str) -> Objective:
    if task not in OBJECTIVES:
        raise TersorError(f"no objective is known for the task {task!r}, only for {', '.join(OBJECTIVES)}")
    return OBJECTIVES[task]


def _split(batch: Batch) -> tuple[Batch, Tensor]:
    return {name: value for name, value in batch.items() if name != "target"}, batch["target"]


def _only(result: Any) -> Tensor:
    """The model's one result; a second head would go without training."""
    if isinstance(result, Tensor):
        return result
    raise TersorError(
        f"the model returns {type(result).__name__} of {len(result)}, the objective needs one tensor; switch its "
        "further outputs off (output_attention, distillation, ...)"
    )
