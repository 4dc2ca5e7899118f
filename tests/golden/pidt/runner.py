import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name != "n_positions"}  # of no effect
    config["n_inner"] = config.get("n_inner") or 0
    model = tersor.models.load("pidt", case.state_dict(), **config)
    check_parameters(case, model)
    inputs = case.inputs()
    predicted = model(**inputs)
    mask = inputs.get("attention_mask", torch.ones(inputs["states"].shape[:2]))
    outputs = {f"{name[:-1]}_preds": value[mask > 0] for name, value in predicted._asdict().items()}
    outputs["last_action"] = predicted.actions[:, -1]
    outputs["action_mse"] = model.loss(predicted, inputs["actions"], mask)[None]
    return {name: outputs[name] for name in case.outputs}
