"""EfficientFormer V1 and V2 beyond their golden cases: timm's layout, other resolutions, feature maps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.harness import Case
from torch import Tensor

import tersor.models
from tersor.errors import TersorError
from tersor.models.registry import find

CASES = Path(__file__).parents[1] / "golden" / "efficientformer"


def loadable(name: str) -> tuple[Case, str, dict[str, Any]]:
    case = Case(CASES / f"{name}.json")
    config = dict(case.config)
    if "e_ratios" in config:
        config["e_ratios"] = list(config["e_ratios"].values())
    return case, config.pop("class").lower(), config


def v1_in_timm_names(key: str) -> str:
    for published, theirs in (("0", "conv1"), ("1", "norm1"), ("3", "conv2"), ("4", "norm2")):
        key = key.replace(f"patch_embed.{published}.", f"stem.{theirs}.")
    key = re.sub(r"network\.([135])\.proj", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv", key)
    key = re.sub(r"network\.([135])\.norm", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.norm", key)
    key = re.sub(r"network\.(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}", key)
    return re.sub(r"layer_scale_(\d)", r"ls\1.gamma", key).replace("dist_head", "head_dist")


def v2_in_timm_names(key: str) -> str:
    for published, theirs in (("0", "conv1.conv"), ("1", "conv1.bn"), ("3", "conv2.conv"), ("4", "conv2.bn")):
        key = key.replace(f"patch_embed.{published}.", f"stem.{theirs}.")
    key = re.sub(r"network\.([13])\.proj", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv.conv", key)
    key = re.sub(r"network\.([13])\.norm", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv.bn", key)
    key = re.sub(r"network\.5\.(conv|bn)", r"stages.3.downsample.conv.\1", key)
    key = key.replace("network.5.attn", "stages.3.downsample.attn").replace("q.local.0", "q.local")
    key = re.sub(r"network\.(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}", key)
    key = re.sub(r"mlp\.(fc1|mid|fc2)\.", r"mlp.\1.conv.", key)
    key = key.replace("mlp.norm1", "mlp.fc1.bn").replace("mlp.norm2", "mlp.fc2.bn").replace("mid_norm", "mid.bn")
    key = re.sub(r"\b(q|q\.proj|k|v|v_local|stride_conv)\.0\.", r"\1.conv.", key)
    key = re.sub(r"\b(q|q\.proj|k|v|v_local|stride_conv)\.1\.", r"\1.bn.", key)
    key = re.sub(r"\bproj\.1\.", "proj.conv.", key)
    key = re.sub(r"\bproj\.2\.", "proj.bn.", key)
    return re.sub(r"layer_scale_(\d)", r"ls\1.gamma", key).replace("dist_head", "head_dist")


@pytest.mark.parametrize(("name", "rename"), [("v1_tiny_vit1", v1_in_timm_names), ("v2_tiny_r128", v2_in_timm_names)])
def test_takes_timm_names(name: str, rename: Any) -> None:
    case, system, config = loadable(name)
    state = {
        rename(key): value.flatten() if "layer_scale" in key else value for key, value in case.state_dict().items()
    }
    assert not any("network" in key or "patch_embed" in key or "layer_scale" in key for key in state)
    model = tersor.models.load(system, state, **config)
    with torch.no_grad():
        case.check("logits", model(**case.inputs()))


@pytest.mark.parametrize("name", ["v1_tiny_vit1", "v2_tiny_r128"])
def test_published_index_buffers_are_not_left_over(name: str) -> None:
    case, system, config = loadable(name)
    state = case.state_dict()
    prefix = next(key.removesuffix("attention_biases") for key in state if key.endswith("attention_biases"))
    state[f"{prefix}attention_bias_idxs"] = torch.zeros(16, 16, dtype=torch.long)
    tersor.models.load(system, state, **config)


@pytest.mark.parametrize(("name", "resolution"), [("v1_tiny_vit1", 160), ("v2_tiny_r128", 192)])
def test_a_checkpoint_runs_at_another_resolution(name: str, resolution: int) -> None:
    case, system, config = loadable(name)
    model = tersor.models.load(system, case.state_dict(), **{**config, "resolution": resolution})
    with torch.no_grad():
        assert model(torch.randn(1, 3, resolution, resolution)).shape == (1, 10)


def test_v2_gives_feature_maps_from_a_classification_checkpoint() -> None:
    case, system, config = loadable("v2_tiny_r128")
    model = tersor.models.load(system, case.state_dict(), **config, fork_feat=True)
    kept: list[Tensor] = []
    model.network[4].register_forward_hook(lambda _module, _inputs, result: kept.append(result))
    with torch.no_grad():
        maps = model(**case.inputs())
    assert [tuple(m.shape) for m in maps] == [(1, 16, 32, 32), (1, 16, 16, 16), (1, 24, 8, 8), (1, 32, 4, 4)]
    case.check("network_4", kept[0])


@pytest.mark.parametrize(
    ("vit_num", "last_stage"),
    [
        (0, ["MapBlock", "MapBlock", "Flatten"]),
        (1, ["MapBlock", "Flatten", "TokenBlock"]),
        (2, ["Flatten", "TokenBlock", "TokenBlock"]),
    ],
)
def test_v1_flattens_once_before_its_token_blocks(vit_num: int, last_stage: list[str]) -> None:
    model = tersor.models.create("efficientformer", **{**find("efficientformer").small, "vit_num": vit_num})
    assert [type(block).__name__ for block in model.network[6]] == last_stage
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(TersorError, match=r"vit_num is 5, of 4 blocks"):
        tersor.models.create("efficientformer_l1", vit_num=5)
    with pytest.raises(TersorError, match=r"resolution 240 leaves an odd grid of 15"):
        tersor.models.create("efficientformerv2_s0", resolution=240)
