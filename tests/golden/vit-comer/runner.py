import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.kernels.ms_deformable_attention import ms_deformable_attention

WITHOUT_EFFECT = ("num_classes", "pretrained", "with_cp")
DETECTION_DEFAULTS = {"version": "detection", "cnn_feature_interaction": False}


def run(case: Case) -> dict[str, Tensor]:
    if "locations" in case.inputs():
        given = case.inputs()
        shapes = [tuple(shape) for shape in case.config["spatial_shapes"]]
        return {"y": ms_deformable_attention(given["value"], shapes, given["locations"], given["weights"]).flatten(2)}
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    assert config.pop("patch_size", 16) == 16
    if case.name.startswith("det"):
        config = {**DETECTION_DEFAULTS, **config}
    model = tersor.models.load("vit_comer", case.state_dict(), **config)
    check_parameters(case, model)
    with torch.no_grad():
        maps = model(case.inputs()["x"])
    return {f"f{level + 1}": each for level, each in enumerate(maps)}
