import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor
from torch.nn import functional as F

from tersor.models.config import config_from_dict
from tersor.models.text.h3 import H3Layer, H3LayerConfig

# the 125M case's own float32 rounding: 6.2e-6 (logits) and 6.3e-6 (hidden) from this model in float64
TOLERANCE = {"logits": 1.2e-5, "hidden": 1.2e-5}
WITHOUT_EFFECT = ("layer_idx", "lr")


def run(case: Case) -> dict[str, Tensor]:
    if "n_layer" in case.config:
        return run_model(case, "h3", outputs={"hidden": "backbone"})
    return layer(case)


@torch.no_grad()
def layer(case: Case) -> dict[str, Tensor]:
    options = {name: value for name, value in case.config.items() if name not in (*WITHOUT_EFFECT, "d_model")}
    mixer = H3Layer(case.config["d_model"], config_from_dict(H3LayerConfig, options, of="h3")).eval()
    mixer.load_state_dict(case.state_dict())
    check_parameters(case, mixer)
    x = case.inputs()["x"]
    length = x.shape[1]
    results = {"y": mixer(x)[0], "kernel": mixer.kernel(length)}
    shift = mixer.ssm_k_kernel(length)
    results["shift_kernel"] = F.pad(shift, (0, length - shift.shape[-1]))
    if "y_prefill_then_step" in case.outputs:
        y, state = mixer(x[:, : length // 2], keep=True)
        pieces = [y]
        for t in range(length // 2, length):
            y, state = mixer(x[:, t : t + 1], state)
            pieces.append(y)
        results["y_prefill_then_step"] = torch.cat(pieces, 1)
    return {name: results[name] for name in case.outputs}
