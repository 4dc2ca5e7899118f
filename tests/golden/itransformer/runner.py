import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor
from torch.nn import functional as F

import tersor.models

WITHOUT_EFFECT = ("factor", "embed", "freq", "class_strategy", "label_len", "d_layers", "moving_avg", "distil")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    if "loss" in case.outputs:
        return train_step(case, config)
    where = {"tokens": "enc_embedding", "layer0": "encoder.attn_layers.0", "encoder": "encoder"}
    return run_model(case, "itransformer", config=config, outputs=where)


def train_step(case: Case, config: dict[str, object]) -> dict[str, Tensor]:
    model = tersor.models.load("itransformer", case.state_dict(), **config).train()
    check_parameters(case, model)
    inputs = case.inputs()
    target = inputs.pop("target")
    forecast = model(**inputs)
    loss = F.mse_loss(forecast, target)
    loss.backward()
    watched = (
        "enc_embedding.value_embedding.weight",
        "encoder.attn_layers.0.attention.query_projection.weight",
        "encoder.attn_layers.1.conv1.weight",
        "projector.bias",
    )
    norms = torch.stack([model.get_parameter(name).grad.norm() for name in watched])
    return {"loss": loss.reshape(1), "forecast": forecast, "grad_norms": norms}
