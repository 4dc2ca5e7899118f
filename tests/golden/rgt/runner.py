import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models

WITHOUT_EFFECT = ("img_size", "use_chk")  # the first only sets which masks are stored


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("rgt", case.state_dict(), **config)
    check_parameters(case, model)
    image = case.inputs()["x"]
    with torch.no_grad():
        got = {"features": model.features(image)[0], "image": model(image)}
    return {name: got[name] for name in case.outputs}
