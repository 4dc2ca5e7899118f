import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.kernels.selective_scan import selective_scan
from tersor.models.vision.efficientvmamba import atrous_merge, atrous_scan

WITHOUT_EFFECT = (
    "d_state", "dt_rank", "ssm_ratio", "attn_drop_rate", "shared_ssm", "softmax_version", "drop_rate",
    "use_checkpoint", "window_size",
)  # fmt: skip


def run(case: Case) -> dict[str, Tensor]:
    if "sequences" in case.outputs:
        return scan_and_merge(case)
    if "u" in case.inputs():
        return scan_of_groups(case)
    assert case.config.get("step_size", 2) == 2
    config = {name: value for name, value in case.config.items() if name not in (*WITHOUT_EFFECT, "step_size")}
    backbone = any(name.startswith(("feature", "out")) for name in case.outputs)
    if backbone:
        config.setdefault("out_indices", (0, 1, 2, 3))
    model = tersor.models.load("efficientvmamba", case.state_dict(), **config)
    check_parameters(case, model)
    image = {"image": case.inputs()["x"]}
    if backbone:
        with torch.no_grad():
            maps = model(**image)
        return dict(zip(sorted(case.outputs), maps, strict=True))
    places = {"logits": "", "stem": "patch_embed", **{f"layer{i}": f"layers.{i}" for i in range(4)}}
    results = capture(model, [places[name] for name in case.outputs], image)
    return {name: results[places[name]] for name in case.outputs}


def scan_and_merge(case: Case) -> dict[str, Tensor]:
    """The published layout is (B, 4, C, L), and the merge is of sequence k times k + 1."""
    x = case.inputs()["x"].permute(0, 2, 3, 1)
    sequences = atrous_scan(x)
    merged = atrous_merge(sequences * torch.arange(1.0, 5)[:, None, None], *x.shape[1:3])
    return {"sequences": sequences.transpose(2, 3), "merged": merged.flatten(1, 2).transpose(1, 2)}


def scan_of_groups(case: Case) -> dict[str, Tensor]:
    """B and C (B, G, N, L): each group of channels is a scan of its own."""
    given = case.inputs()
    groups = given["B"].shape[1]
    u, delta = (given[name].transpose(1, 2).chunk(groups, -1) for name in ("u", "delta"))
    A, D = given["A"].chunk(groups), given["D"].chunk(groups) if "D" in given else [None] * groups
    bias = given["delta_bias"].chunk(groups) if "delta_bias" in given else [None] * groups
    softplus = case.config.get("delta_softplus", False)
    ys = [
        selective_scan(
            u[g], delta[g], A[g], *(given[name][:, g].transpose(1, 2) for name in "BC"), D=D[g], dt_bias=bias[g],
            dt_softplus=softplus,
        )[0]
        for g in range(groups)
    ]  # fmt: skip
    return {"y": torch.cat(ys, -1).transpose(1, 2)}
