import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.kernels.ssd import non_causal

WITHOUT_EFFECT = ("img_size", "patch_size", "qkv_bias", "use_checkpoint", "ssd_chunk_size")


def run(case: Case) -> dict[str, Tensor]:
    if "V" in case.inputs():
        return operator(case)
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    backbone = any(name.startswith("feature") for name in case.outputs)
    if backbone:
        config.setdefault("out_indices", (0, 1, 2, 3))
    model = tersor.models.load("vssd", case.state_dict(), **config)
    check_parameters(case, model)
    image = {"image": case.inputs()["x"]}
    if backbone:
        with torch.no_grad():
            maps = model(**image)
        return {f"feature{index}": each for index, each in zip(model.config.out_indices, maps, strict=True)}
    places = {"stem": "patch_embed", "logits": "", **{f"layer{i}": f"layers.{i}" for i in range(4)}}
    results = capture(model, [places[name] for name in case.outputs], image)
    return {name: tokens(results[places[name]]) for name in case.outputs}


def operator(case: Case) -> dict[str, Tensor]:
    V, dt, A_log, B, C, D = (case.inputs()[name] for name in ("V", "dt", "A_log", "B", "C", "D"))
    sign = 1 if case.config.get("ssd_positve_dA", True) else -1

    def y(groups: int) -> Tensor:
        B_, C_ = (each.unflatten(-1, (groups, -1)) for each in (B, C))
        return non_causal(V, sign * dt * A_log.exp(), B_, C_, D=D)

    return {name: y(int(name.removeprefix("y").removeprefix("_groups") or 1)) for name in case.outputs}


def tokens(x: Tensor) -> Tensor:
    return x.flatten(1, 2) if x.dim() == 4 else x
