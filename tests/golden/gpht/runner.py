import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor, nn
from torch.nn import functional as F

import tersor.models

WITHOUT_EFFECT = ("factor", "output_attention", "pred_len", "seq_len", "embed", "freq", "task_name", "moving_avg")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    inputs = case.inputs()
    x = inputs["x_enc"]
    token_len = config.get("token_len", 48)
    model = tersor.models.load("gpht", case.state_dict(), **config, seq_len=x.shape[1], pred_len=token_len)
    check_parameters(case, model)
    if "loss" in case.outputs:
        return train_step(model.train(), x, inputs["next"])
    rolled = [name for name in case.outputs if name == "rollout"]
    model.forward = model.next_tokens  # type: ignore[method-assign]
    outputs = {name: f"encoders.{name[5:]}" if name.startswith("stage") else "" for name in case.outputs}
    found = capture(model, sorted(set(outputs.values())), {"x": x})
    got = {name: found[path] for name, path in outputs.items() if name != "rollout"}
    for name in rolled:
        with torch.no_grad():
            got[name] = model.forecast(x, case._outputs[name]["shape"][1])
    return got


def train_step(model: nn.Module, x: Tensor, following: Tensor) -> dict[str, Tensor]:
    forecast = model(x)
    loss = F.mse_loss(forecast, torch.cat((x, following), 1)[:, -x.shape[1] :])
    loss.backward()
    watched = (
        "encoders.0.patch_embedding.value_embedding.weight",
        "encoders.0.encoder.attn_layers.0.attention.query_projection.weight",
        "encoders.1.forecast_head.weight",
        "encoders.1.forecast_head.bias",
    )
    norms = torch.stack([model.get_parameter(name).grad.norm() for name in watched])
    return {"loss": loss.reshape(1), "forecast": forecast, "grad_norms": norms}
