import pytest
import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.sequence.lmuformer import LMU, impulse_response

SYSTEMS = {"lmu_rnn_conv1d": "lmuformer", "slmu_rnn_ms_conv1d": "spiking_lmuformer"}
WITHOUT_EFFECT = ("model", "img_size_h", "img_size_w", "qkv_bias", "T", "sr_ratios", "num_heads", "patch_size")


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "cls" in case.config:
        return cell(case)
    if case.config["model"] not in SYSTEMS:
        pytest.skip(f"{case.config['model']} is not among our models")
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    system = SYSTEMS[case.config["model"]]
    model = tersor.models.load(system, case.state_dict(), **config)
    check_parameters(case, model)
    x = case.inputs()["x"]
    if system == "spiking_lmuformer":  # a spike more or less is no rounding error: the cases are in float64
        model, x = model.double(), x.double()
    features = model.features(x).transpose(1, 2)
    return {"logits": model(x), "features": features, "logits_all_seq": model.all_seq(x).transpose(0, 1)}


def cell(case: Case) -> dict[str, Tensor]:
    config = case.config
    spiking = config["cls"].startswith("Spiking")
    sizes = (config["input_size"], config["hidden_size"], config["memory_size"])
    lmu = LMU(*sizes, config["theta"], spiking=spiking).eval()
    lmu.load_state_dict(case.state_dict(), strict=False)
    check_parameters(case, lmu)
    x = case.inputs()["x"]
    h, _ = lmu(x)
    H = impulse_response(lmu.A.double(), lmu.B.double(), config["seq_len"])
    results = {"h": h, "h_n": h[:, -1, :, None] if spiking else h[:, -1]}
    results |= {"A_discrete": lmu.A, "B_discrete": lmu.B, "H": H, "h_recurrent": lmu(x, last=False)[0]}
    return {name: results[name] for name in case.outputs}
