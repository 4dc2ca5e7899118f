from typing import Any

import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models


def run(case: Case) -> dict[str, Tensor]:
    """The cases hold the published encoder without its head, and the source model's table as an input."""
    inputs = case.inputs()
    points = inputs.pop("points")
    model = tersor.models.load("any2point", {**case.state_dict(), **inputs}, **settings(case))
    check_parameters(case, model)
    last_stage = "patch_embed.stages.2.linear2"
    each = [f"{part}.{n}" for n in range(model.config.depth) for part in ("blocks", "guides")]
    captured = capture(model, ["", "patch_embed", last_stage, *each], {"points": points})
    centers = captured["patch_embed"]
    with torch.no_grad():
        places = model.places(centers)
        positions = model.positions(places)
    results = {
        "features": captured[""],
        "centers": centers,
        "point_tokens": captured[last_stage].unflatten(0, (*centers.shape[:2], -1)).amax(2).transpose(1, 2),
        "position_embedding": positions,
    }
    for n in range(model.config.depth):
        results[f"block{n}"] = torch.cat((captured[f"blocks.{n}"][:, :1], captured[f"guides.{n}"]), 1)
    if model.config.source == "language":
        results["virtual_positions"] = places
    else:
        results |= {f"virtual_{axis}": places[..., i].flatten(0, 1) for i, axis in enumerate("xy")}
    return {name: results[name] for name in case.outputs}


def settings(case: Case) -> dict[str, Any]:
    """Published arguments (of the constructor and of the command line) -> our fields."""
    said = {**case.config["model"], **case.config["args"]}
    assert said.pop("num_view", 6) == 6
    language = "attn1d_dim" in said
    rows = next(spec["shape"] for name, spec in case._inputs.items() if name != "points")[-2]
    axes = "1d" if language else "2d"
    ours = {
        "source": "language" if language else "audio" if rows == 229 else "vision",
        "num_classes": 0,
        "across_batch": language or said.get("type") == "mn40",
        "global_feat": tuple(said.pop("global_feat").split(",")),
        "attn_dim": said.pop(f"attn{axes}_dim"),
        "coef_grid": said.pop(f"coef_{axes}gird"),
        "maxmean": said.pop(f"maxmean_{axes}", False),
        "norm_eps": said.pop("norm_args", {"eps": 1e-6})["eps"],
    }
    return {**ours, **said.pop("adapter_args"), **said}
