import math

import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor, nn

from tersor.layers import dtcwt
from tersor.models.vision.svt import TokenScattering, token_label_loss

WITHOUT_EFFECT = ("sr_ratios", "num_stages", "qkv_bias", "qk_scale", "drop_rate", "attn_drop_rate")


def run(case: Case) -> dict[str, Tensor]:
    if "mixed_box" in case.outputs:
        return losses(case)
    if "low_of_x" in case.outputs:
        inputs = case.inputs()
        low, high = dtcwt.forward(inputs["x"])
        back = dtcwt.inverse(inputs["low"], inputs["high"])
        return {"low_of_x": low, "high_of_x": high, "inverse_of_low_high": back}
    if "tokens" in case.inputs():
        return channel_token_mixing(case)
    config = {name: value for name, value in case.config.items() if name not in (*WITHOUT_EFFECT, "norm_layer")}
    config["norm_eps"] = float(case.config.get("norm_layer", "eps=1e-5").partition("eps=")[2] or 1e-5)
    return run_model(case, "svt", config=config, outputs={name: place(name) for name in case.outputs})


def place(output: str) -> str:
    """stage2 -> norm2; scatter_block1_0 -> block1.0.attn."""
    if output.startswith("stage"):
        return f"norm{output.removeprefix('stage')}"
    if "_block" in output:
        stage, block = output.partition("_block")[2].split("_")
        return f"block{stage}.{block}.attn"
    return ""


@torch.no_grad()
def channel_token_mixing(case: Case) -> dict[str, Tensor]:
    tokens = case.inputs()["tokens"]
    side = math.isqrt(tokens.shape[1])
    mixer: nn.Module = TokenScattering(case.config["dim"], side)
    mixer.load_state_dict({key: value for key, value in case.state_dict().items() if "fm." not in key})
    check_parameters(case, mixer)
    return {"out": mixer(tokens, side, side)}


def losses(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    target, box, nothing = inputs["target_logits"].softmax(1), (1, 0, 3, 4), (0, 0, 0, 0)

    def loss(box: tuple[int, int, int, int], target: Tensor) -> Tensor:
        return token_label_loss((inputs["cls"], inputs["aux"], box), target, **case.config).reshape(1)

    return {
        "mixed_box": loss(box, target),
        "no_box": loss(nothing, target),
        "class_target_only": loss(nothing, target[:, :, 1]),
    }
