import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models

WITHOUT_EFFECT = ("pretrained", "pretrained2d", "frozen_stages", "use_checkpoint", "norm_layer")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("driver", case.state_dict(), **config)
    check_parameters(case, model)
    clip = case.inputs()["video"]
    results = {
        "patches": capture(model, ["backbone.patch_embed"], {"clip": clip})["backbone.patch_embed"].movedim(-1, 1)
    }
    with torch.no_grad():
        results |= {"features": model.features(clip)[-1], "logits": model(clip)}
    return {name: results[name] for name in case.outputs}
