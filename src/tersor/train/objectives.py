"""What training lowers: small functions (model, batch) -> {"loss": scalar, and other values that are worth reporting}.

A batch is forward's keyword arguments by name, and under "target" what they should give. Which objective a model has
follows from the task that it is registered with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.train.average_precision import average_precision

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


def forecasting(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Mean squared error of the forecast (B, H, N) over all samples, steps and variates.

    A model that in training also predicts the steps before the horizon gives more than H. Its last H steps are the
    horizon; those before are compared with the look-back x_enc.
    """
    inputs, target = _split(batch)
    forecast = _only(model(**inputs)).float()
    if forecast.shape[1] > target.shape[1]:
        target = torch.cat((batch["x_enc"], target), 1)[:, -forecast.shape[1] :]
    return {"loss": F.mse_loss(forecast, target), "mae": F.l1_loss(forecast, target)}


def classification(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the logits (B, classes) with class numbers (B,); of several heads' logits, the mean."""
    inputs, target = _split(batch)
    result = model(**inputs)
    heads = [each.float() for each in (result if isinstance(result, tuple) else (result,))]
    if any(head.shape != heads[0].shape for head in heads):
        raise TersorError(
            f"the model returns {', '.join(str(list(head.shape)) for head in heads)}: only heads with equal logits train"
        )
    loss = torch.stack([F.cross_entropy(head, target) for head in heads]).mean()
    logits = torch.stack(heads).mean(0)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == target).float().mean()}


def answering(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of one answer a sequence, target (B,): of logits (B, classes), or of (B, L, V) those at the end.

    lengths (B,), if the batch has them: where sequences end, before their padding. A model whose forward has `lengths` gets
    them. Pairs of sequences (B, 2, L) go in as 2 B, the first members first.
    """
    inputs, target = _split(batch)
    lengths = inputs.pop("lengths", None)
    if lengths is not None and lengths.dim() == 2:
        inputs = {name: value.transpose(0, 1).flatten(0, 1) for name, value in inputs.items()}
        lengths = lengths.T.flatten()
    if lengths is not None and "lengths" in inspect.signature(model.forward).parameters:
        inputs["lengths"] = lengths
    logits = _only(model(**inputs)).float()
    if logits.dim() == 3:
        end = torch.full_like(target, logits.shape[1]) if lengths is None else lengths
        logits = logits[torch.arange(len(target), device=target.device), end - 1]
    if logits.dim() != 2 or len(logits) != len(target):
        raise TersorError(f"the model gives {list(logits.shape)}, logits for {len(target)} answers are needed")
    return {"loss": F.cross_entropy(logits, target), "accuracy": (logits.argmax(-1) == target).float().mean()}


def restoration(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """L1 distance of the picture (B, C, H, W), in [0, 1], from what it should be; the PSNR of all channels in dB beside it."""
    inputs, target = _split(batch)
    picture = _only(model(**inputs)).float()
    if picture.shape != target.shape:
        raise TersorError(f"the model makes pictures {list(picture.shape)}, the data hold {list(target.shape)}")
    errors = (picture.detach().clamp(0, 1) - target).square().flatten(1).mean(1)
    return {"loss": F.l1_loss(picture, target), "psnr": -10 * errors.clamp_min(1e-10).log10().mean()}


IGNORED = 255  # the number of pixels that no class was given to


def segmentation(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the logits (B, classes, H, W) with class numbers (B, H, W), over all pixels that have one."""
    inputs, target = _split(batch)
    logits = _only(model(**inputs))
    if logits.dim() != 4:
        raise TersorError(f"the model gives {list(logits.shape)}, logits [images, classes, height, width] are needed")
    count = (target != IGNORED).sum().clamp_min(1)
    loss = F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum") / count
    return {"loss": loss, "accuracy": (logits.argmax(1) == target).sum() / count}


def language_modelling(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of token t + 1 given the tokens up to t: logits (B, L, V) of input_ids (B, L)."""
    logits = _only(model(**batch)).float()[:, :-1]
    return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())}


MASKED = 0.15  # BERT's share of the tokens that are asked for


def masked_language_modelling(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of tokens that were replaced by random ones: logits (B, L, V) of input_ids (B, L).

    A model that sees the whole window would have the next token in sight, so that is not asked. 15 % of the positions, at least
    one, are drawn with torch's random numbers: the trainer's seeds decide.
    """
    tokens = batch["input_ids"]
    chosen = torch.rand(tokens.shape, device=tokens.device) < MASKED
    chosen[:, 0] |= ~chosen.any(1)
    vocabulary = int(tokens.max()) + 1
    noise = torch.randint(vocabulary, tokens.shape, device=tokens.device)
    logits = _only(model(**{**batch, "input_ids": torch.where(chosen, noise, tokens)})).float()
    return {"loss": F.cross_entropy(logits[chosen], tokens[chosen])}


def link_prediction(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Binary cross-entropy of the pairs' logits (B,), target 1 where they meet; the batch's average precision beside it."""
    inputs, target = _split(batch)
    logits = _only(model(**inputs)).float()
    precision = average_precision(logits.detach(), target)
    return {"loss": F.binary_cross_entropy_with_logits(logits, target), "ap": logits.new_tensor(precision)}


def graph_prediction(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of nodes or graphs: cross-entropy where the target (B,) is a class, binary cross-entropy where it is bool (B, labels),
    else the L1 distance from numbers (B,) or (B, targets). `rows`: which of the model's rows are asked for; all without it."""
    inputs, target = _split(batch)
    rows = inputs.pop("rows", None)
    result = _only(model(**inputs)).float()
    result = result if rows is None else result[rows]
    if target.dtype == torch.int64:
        accuracy = (result.argmax(-1) == target).float().mean()
        return {"loss": F.cross_entropy(result, target), "accuracy": accuracy}
    if target.dtype == torch.bool:
        accuracy = ((result > 0) == target.view_as(result)).float().mean()
        return {
            "loss": F.binary_cross_entropy_with_logits(result, target.view_as(result).float()),
            "accuracy": accuracy,
        }
    return {"loss": F.l1_loss(result, target.view_as(result))}


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
