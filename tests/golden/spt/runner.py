from typing import Any

import numpy as np
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.data.denoising import PIXEL_CLASSES, denoise_numbers, denoise_tokens, next_element, span_mask
from tersor.train.self_pretraining import denoising

# Off by 5.2e-6 on one processor, by less on others: 1024 steps of attention add up in another order.
TOLERANCE = {"pred": 1e-5}


def run(case: Case) -> dict[str, Any]:
    if "calls" in case.config:
        return {f"span_mask_{i}": _span_mask(**call) for i, call in enumerate(case.config["calls"])}
    config = dict(case.config)
    causal = config.pop("objective", "masked") == "causal" or config.get("causal", False)
    config.setdefault("pos", not config.get("rotary", False))
    model = tersor.models.load("spt", case.state_dict(), pool="none", **config)
    check_parameters(case, model)
    classes = "vocab" not in config and config["d_output"] == PIXEL_CLASSES
    model_input, target = _prepared(case.inputs(), causal=causal, classes=classes)
    captured = capture(model, ["", "model"], {"x": model_input})
    loss = denoising(model, {"x": model_input, "target": target})["loss"].detach()
    predicted = captured[""]
    given = {"logits": predicted, "pred": predicted, "features": captured["model"], "loss": loss[None]}
    given |= {"model_input": model_input, "target": target.reshape(case._outputs["target"]["shape"])}
    return {name: given[name] for name in case.outputs}


def _prepared(inputs: dict[str, Tensor], *, causal: bool, classes: bool) -> tuple[Tensor, Tensor]:
    sequence = inputs["ids"] if "ids" in inputs else inputs["pixels"]
    if causal:
        return next_element(sequence, pixel_classes=classes)
    if "ids" in inputs:
        return denoise_tokens(sequence, inputs["mask"])
    return denoise_numbers(sequence, inputs["mask"], pixel_classes=classes)


def _span_mask(seq_length: int, masking_ratio: float, span_length: float, numpy_seed: int) -> Tensor:
    return span_mask(seq_length, masking_ratio, span_length, np.random.RandomState(numpy_seed))[:, 0]
