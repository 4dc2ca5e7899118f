"""Self-pretraining: fill holes in the task's own inputs, then learn the task (Amos, Berant and Gupta, ICLR 2024).

    told = self_pretrain(model, labelled, out="run/pretraining", config=TrainConfig(epochs=50, lr=1e-3))
    train(model, labelled, objective=classification, out="run", config=TrainConfig(epochs=200))     # all weights learn

The model is built a second time, with an output at every position instead of the classifier, and trained on
`tersor.data.denoising` of the same data. Then every weight whose name and shape agree goes into `model`. The others (the head;
of numbers also the first layer, which saw the mask as one more channel) stay random, and are named in the result.

A model takes part if it says how it looks with an output at every position, by

    pretraining_config(channels=, outputs=, length=, causal=) -> config

or if it gives such outputs anyway: a language model, whose pretraining is causal, or a masked one. The user chooses a rate for
each of the two trainings.

Origin: IdoAmos/not-from-scratch at f919137 (MIT). Proven: the losses of the published code (golden cases); on a small task
with few labels, more accuracy than from scratch in equally many steps. Not proven: the published accuracies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.data.denoising import IGNORED_NUMBER, IGNORED_TOKEN, PIXEL_CLASSES, Denoising, DenoisingConfig
from tersor.errors import TersorError
from tersor.models import find
from tersor.progress import Progress
from tersor.train.config import TrainConfig
from tersor.train.objectives import Batch
from tersor.train.trainer import train


@dataclass(frozen=True)
class Transfer:
    """Names of tensors."""

    kept: tuple[str, ...]  # those that came from the pretrained model
    fresh: tuple[str, ...]  # those that begin anew


def denoising(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss at the positions that are asked for: cross-entropy of classes (target int64), else the mean absolute error.

    Predictions (B, L, outputs); target (B, L), or of several channels of numbers (B, L, c).
    """
    inputs = {name: value for name, value in batch.items() if name != "target"}
    target, predicted = batch["target"], model(**inputs).float()
    if target.is_floating_point():
        predicted = predicted.reshape(target.shape) if predicted.numel() == target.numel() else predicted
        if predicted.shape != target.shape:
            raise TersorError(f"the model gives {list(predicted.shape)}, the data ask for {list(target.shape)}")
        asked = target != IGNORED_NUMBER
        error = (predicted - target).abs().masked_fill(~asked, 0)
        return {"loss": error.sum() / asked.sum().clamp_min(1)}
    asked = target != IGNORED_TOKEN
    count = asked.sum().clamp_min(1)  # a batch of short sequences may have nothing hidden
    classes = predicted.flatten(0, -2), target.flatten()
    loss = F.cross_entropy(*classes, ignore_index=IGNORED_TOKEN, reduction="sum") / count
    return {"loss": loss, "accuracy": ((predicted.argmax(-1) == target) & asked).sum() / count}


def self_pretrain(
    model: nn.Module,
    labelled: Any,
    *,
    out: str | Path,
    config: TrainConfig,
    task: DenoisingConfig | None = None,
    validation: Any = None,
    progress: Progress | None = None,
) -> Transfer:
    """Pretrain on the inputs of `labelled` (items {"x" or "input_ids", ...}) and put the weights into `model`.

    Raises TersorError where the model has no outputs at every position, or the objective does not go with it.
    """
    task = task or DenoisingConfig()
    twin = pretraining_model(model, labelled, task)
    held_out = None if validation is None else Denoising(validation, task)
    train(
        twin,
        Denoising(labelled, task),
        objective=denoising,
        out=out,
        config=config,
        validation=held_out,
        progress=progress,
    )
    return transfer(twin.state_dict(), model)


def pretraining_model(model: nn.Module, labelled: Any, task: DenoisingConfig) -> nn.Module:
    """The same architecture, freshly initialised, with an output at every position."""
    kind: Any = type(model)
    own: Any = getattr(model, "pretraining_config", None)
    if own is None:
        objective = {"language-model": "causal", "masked-language-model": "masked"}.get(find(kind.system).task)
        if objective is None:
            raise TersorError(f"{kind.system} has no outputs at every position, and cannot be pretrained on holes")
        if task.objective != objective:
            raise TersorError(f"{kind.system}'s pretraining is {objective}, not {task.objective}")
        language_model: nn.Module = kind(model.config)
        return language_model
    sequence: Tensor = next(labelled[0][name] for name in ("x", "input_ids") if name in labelled[0])
    causal = task.objective == "causal"
    channels, outputs = 1, getattr(model.config, "vocab", None) or 0
    if sequence.is_floating_point():
        channels, outputs = sequence.shape[1] + (not causal), sequence.shape[1]
        if task.pixel_classes:
            if outputs != 1:
                raise TersorError(f"grey values are asked for of one channel; the data have {outputs}")
            outputs = PIXEL_CLASSES
    twin: nn.Module = kind(own(channels=channels, outputs=outputs, length=len(sequence), causal=causal))
    return twin


def transfer(state: dict[str, Tensor], model: nn.Module) -> Transfer:
    """Copy into `model` every tensor whose name and shape agree."""
    own = model.state_dict()
    kept = tuple(name for name, value in own.items() if name in state and state[name].shape == value.shape)
    if not kept:
        raise TersorError("no weight of the pretrained model has the name and shape of one of the model's")
    model.load_state_dict({**own, **{name: state[name] for name in kept}})
    return Transfer(kept, tuple(name for name in own if name not in kept))
