from typing import Any

import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.kernels.selective_scan import selective_scan
from tersor.layers.aligned_scan import aligned_scan, importance, spans

BUILT = {  # the published models' switches, the only ones that are built
    "rms_norm": True,
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_devide_out": True,
    "use_middle_cls_token": True,
    "final_pool_type": "mean",
}
WITHOUT_EFFECT = ("residual_in_fp32", "fused_add_norm")  # all is float32


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "keep" in case.config:
        return scans(case)
    return plainmamba(case) if {"arch", "layer_cfgs"} & case.config.keys() else vim(case)


def plainmamba(case: Case) -> dict[str, Tensor]:
    config = dict(case.config)
    arch = config.pop("arch", None)
    name = "plainmamba" if arch is None else f"plainmamba_{arch.lower()}"
    layer = config.pop("layer_cfgs", {})
    mamba = layer.get("mamba_cfg", {})
    assert not layer.get("use_rms_norm", False), f"{case.name}: RMSNorm is not built"
    assert mamba.get("bias", True), f"{case.name}: projections without biases are not built"
    assert mamba.get("conv_bias", True), f"{case.name}: a convolution without a bias is not built"
    config |= {key: mamba[key] for key in ("d_state", "expand", "conv_size", "init_layer_scale") if key in mamba}
    model = tersor.models.load(name, case.state_dict(), **config)
    check_parameters(case, model)
    image = case.inputs()["x"]
    results = capture(model, ["backbone.patch_embed", ""], {"image": image})
    patches = results["backbone.patch_embed"].flatten(2).transpose(1, 2)
    return {"patches": patches, "tokens": model.tokens(image)[0], "logits": results[""]}


def vim(case: Case) -> dict[str, Tensor]:
    config: dict[str, Any] = {key: value for key, value in case.config.items() if key not in WITHOUT_EFFECT}
    for name, value in BUILT.items():
        assert config.pop(name, value) == value, f"{case.name}: {name} is not built"
    schedule = tuple(layer for layer in (5, 10, 15) if layer <= config["depth"])
    model = tersor.models.load("vim", case.state_dict(), **config, prune_after=schedule, keep=0.8, pruning="snapshot")
    check_parameters(case, model)
    image = case.inputs()["x"]
    cls, kept = model.encode(image)
    results = {"cls": cls, "logits": model(image), **{f"kept{number}": each for number, each in enumerate(kept)}}
    return {name: results[name] for name in case.outputs}


def scans(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    u, dt, B, C, score = (inputs[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "score"))
    dt, A, D = F.softplus(dt), inputs["A"], inputs["D"]
    weight = importance(score)
    kept = weight.topk(case.config["keep"], dim=1).indices.sort(1).values

    def rows(x: Tensor) -> Tensor:
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))

    few = (rows(u), rows(dt))
    results = {
        "dense": selective_scan(u, dt, A, B, C, D=D)[0],
        "aligned": aligned_scan(*few, spans(dt, kept), A, rows(B), rows(C), D=D),
        "naive": aligned_scan(*few, few[1], A, rows(B), rows(C), D=D),
    }
    return {"importance": weight, "kept": kept, **{name: y.transpose(1, 2) for name, y in results.items()}}
