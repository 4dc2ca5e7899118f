import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor

import tersor.models

WITHOUT_EFFECT = ("use_gpu",)


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    if "gpt2_layers" in config:
        config["n_layer"] = config.pop("gpt2_layers")
    keys = case.state_dict()
    if "mapping_layer.weight" in keys:
        return reprogram(case, config, keys)
    if "lstm.weight_ih_l0" in keys:
        system = "gpt4battery_lstm"
    else:
        system = "gpt4battery" if "gpt2.wte.weight" in keys else "gpt4battery_transformer"
        config["across_batch"] = True
    model = tersor.models.load(system, keys, **config)
    check_parameters(case, model)
    with torch.no_grad():
        reconstruction, features = model(**case.inputs())
    found = {"reconstruction": reconstruction, "features": features}
    return {name: found[name] for name in case.outputs}


def reprogram(case: Case, config: dict[str, object], keys: dict[str, Tensor]) -> dict[str, Tensor]:
    model = tersor.models.load("gpt4battery_reprogram", keys, **config)
    case.parameters -= keys["value_embedding.tokenConv.weight"].numel()  # never called
    check_parameters(case, model)
    return run_model(case, "gpt4battery_reprogram", config=config, outputs=WHERE)


WHERE = {"out": "", "patches": "patch_embedding", "reprogrammed": "reprogramming_layer"}
