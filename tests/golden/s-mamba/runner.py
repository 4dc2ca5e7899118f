import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor
from torch.nn import functional as F

import tersor.models

WITHOUT_EFFECT = (
    *(
        "output_attention",
        "embed",
        "freq",
        "class_strategy",
        "n_heads",
        "factor",
        "label_len",
        "d_layers",
        "moving_avg",
    ),
    *("distil", "enc_in", "dec_in", "c_out"),
)
NEVER_CALLED = 2464  # parameters a layer in modules of the published code that nothing calls
OUTPUTS = {
    "tokens": "enc_embedding",
    "forward_scan0": "encoder.attn_layers.0.attention",
    "backward_scan0": "encoder.attn_layers.0.attention_r",
    "encoder": "encoder",
}


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    case.parameters -= NEVER_CALLED * config.get("e_layers", 2)
    if "loss" in case.outputs:
        return train_step(case, config)
    layers = {f"layer{n}": f"encoder.attn_layers.{n}" for n in range(config.get("e_layers", 2))}
    return run_model(case, "s_mamba", config=config, outputs={**OUTPUTS, **layers})


def train_step(case: Case, config: dict[str, object]) -> dict[str, Tensor]:
    model = tersor.models.load("s_mamba", case.state_dict(), **config).train()
    check_parameters(case, model)
    inputs = case.inputs()
    target = inputs.pop("target")
    forecast = model(**inputs)
    loss = F.mse_loss(forecast, target)
    loss.backward()
    layer = model.get_submodule("encoder.attn_layers.0")
    watched = ("attention.A_log", "attention_r.in_proj.weight", "attention.dt_proj.bias", "attention.conv1d.weight")
    norms = torch.stack([layer.get_parameter(name).grad.norm() for name in (*watched, "attention.D")])
    return {"loss": loss.reshape(1), "forecast": forecast, "grad_norms": norms}
