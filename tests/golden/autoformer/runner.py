from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor
from torch.nn import functional as F

import tersor.models

WITHOUT_EFFECT = ("distil", "d_state", "class_strategy", "use_norm")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("autoformer", case.state_dict(), **config)
    check_parameters(case, model)
    inputs = case.inputs()
    if "loss" in case.outputs:
        return train_step(model.train(), inputs, inputs.pop("target"))
    kept: dict[str, Any] = {}
    layers = {
        name: model.get_submodule(f"encoder.attn_layers.{name}") for name in map(str, range(model.config.e_layers))
    }
    for name, module in {"encoder": model.encoder, "decoder": model.decoder, **layers}.items():
        module.register_forward_hook(lambda _module, _inputs, result, name=name: kept.update({name: result}))
    for name, layer in layers.items():
        layer.attention.register_forward_hook(
            lambda _module, _inputs, result, name=name: kept.update({f"autocorrelation{name}": result[0]})
        )
    with torch.no_grad():
        result = model(**inputs)
    correlations = kept["encoder"][1]
    found = {
        "forecast": result if isinstance(result, Tensor) else result[0],
        "seasonal": kept["decoder"][0],
        "trend": kept["decoder"][1],
        "encoder": kept["encoder"][0],
        **{name: value for name, value in kept.items() if name.startswith("autocorrelation")},
        **{f"correlation{n}": value for n, value in enumerate(correlations) if value is not None},
        **{f"layer{name}": kept[name][0] for name in layers},
    }
    return {name: found[name] for name in case.outputs}


def train_step(model: Any, inputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    forecast = model(**inputs)
    loss = F.mse_loss(forecast, target)
    loss.backward()
    watched = (
        "enc_embedding.value_embedding.tokenConv.weight",
        "encoder.attn_layers.0.attention.query_projection.weight",
        "decoder.layers.0.projection.weight",
        "decoder.projection.bias",
    )
    norms = torch.stack([model.get_parameter(name).grad.norm() for name in watched])
    return {"loss": loss.reshape(1), "forecast": forecast, "grad_norms": norms}
