"""Vision models as backbones, and checkpoints for other numbers of classes and channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.harness import Case
from torch import nn

import tersor.models
from tersor.errors import TersorError
from tersor.models import ModelInfo

CASES = Path(__file__).parents[1] / "golden"
SYSTEMS = list({info.system: info for info in tersor.models.list("v*/*")}.values())
WITH_MAPS = [info for info in SYSTEMS if info.system != "lrgt" and hasattr(info.load_class(), "features")]
CLASSIFIERS = [info for info in SYSTEMS if info.task == "classify"]
REDUCTIONS = {  # those that are not 4, 8, 16, 32
    "shvit": [16, 32, 64],
    "sret": [8, 16, 32],
    "mobilevit": [2, 4, 8, 16, 32],
    "mobilevitv2": [2, 4, 8, 16, 32],
    "pp_mobileseg": [8, 16, 32],
    "driver": [4, 8],
    "plainmamba": [16],
    "dlgsanet": [1],
    "rgt": [1],
}


def named(info: ModelInfo) -> str:
    return info.system


def input_of(model: nn.Module, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    (found,) = model.example_inputs(batch).values()  # type: ignore[operator]
    return found


def test_every_hierarchical_classifier_has_maps() -> None:
    plain = {"ats", "nvit", "vim", "vit"}  # one resolution throughout
    assert {info.system for info in CLASSIFIERS} - {info.system for info in WITH_MAPS} == plain


@pytest.mark.parametrize("info", WITH_MAPS, ids=named)
def test_gives_the_maps_it_tells_of_and_every_parameter_left_learns(info: ModelInfo) -> None:
    torch.manual_seed(0)
    whole = tersor.models.create(info.system, **info.small).eval()
    backbone = tersor.models.create(info.system, features_only=True, **info.small)
    assert backbone.training
    backbone.model.load_state_dict({key: whole.state_dict()[key] for key in backbone.model.state_dict()})
    image = input_of(whole)
    maps, expected = backbone.eval()(image), whole.features(image)
    told = backbone.feature_info
    assert told.reduction() == REDUCTIONS.get(info.system, [4, 8, 16, 32])
    assert [each.shape[1] for each in maps] == told.channels()
    for each, same, reduction in zip(maps, expected, told.reduction(), strict=True):
        assert torch.equal(each, same)
        for side, of_map in zip(image.shape[-2:], each.shape[-2:], strict=True):
            assert side // reduction <= of_map <= side // reduction + 1
    sum(each.square().sum() for each in maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_stages_are_chosen_by_index_also_from_the_end() -> None:
    small = tersor.models.find("smt").small
    backbone = tersor.models.create("smt", features_only=True, out_indices=(3, -3), **small)
    assert [(each.index, each.channels, each.reduction) for each in backbone.feature_info] == [(3, 32, 32), (1, 16, 8)]
    with torch.no_grad():
        assert [list(each.shape) for each in backbone(torch.randn(1, 3, 64, 96))] == [[1, 32, 2, 3], [1, 16, 8, 12]]


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("vit", {}, "VisionTransformer has no stages"),
        ("smt", {"out_indices": (4,)}, r"out_indices \(4,\): SMT has 4 maps, 0 to 3"),
        ("smt", {"out_indices": ()}, r"out_indices \(\)"),
        ("shvit", {"out_indices": (-4,)}, "0 to 2"),
        ("shvit", {"out_indices": 2}, "out_indices 2: SHViT has 3 maps"),
        ("shvit", {"out_indices": "12"}, "out_indices '12': SHViT has 3 maps"),
        ("shvit", {"out_indices": [0.5]}, r"out_indices \(0.5,\): SHViT has 3 maps"),
        ("itransformer", {}, "ITransformer has no stages"),
    ],
)
def test_refuses_what_has_no_maps(name: str, overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        tersor.models.create(name, features_only=True, **tersor.models.find(name).small, **overrides)


# what a case holds of the stages: index of the map -> output of the case
HELD = [
    ("shvit", "tiny_iss", "shvit", (), {0: "stage1", 1: "stage2", 2: "stage3"}),
    ("sret", "tiny_sliced_perm", "sret", ("patch_size", "stride"), {0: "stage1", 1: "stage2", 2: "stage3"}),
    ("smt", "tiny", "smt", (), {0: "stage1", 1: "stage2", 2: "stage3", 3: "stage4"}),
    ("svt", "tiny_cls", "svt", ("norm_layer",), {0: "stage1", 1: "stage2", 2: "stage3"}),
    ("stvit", "tiny", "stvit", (), {3: "layer3"}),
    ("turbovit", "hiera_tiny", "turbovit", (), {3: "block5"}),
    ("vit-comer", "seg-tiny", "vit_comer", ("patch_size",), {0: "f1", 1: "f2", 2: "f3", 3: "f4"}),
    ("mobilevit", "mobilevit_xxs", "mobilevit_xxs", ("variant",), {2: "stage2", 3: "stage3", 4: "stage4"}),
    ("mobilevit", "mobilevitv2_050", "mobilevitv2_050", ("variant",), {2: "stage2", 3: "stage3", 4: "stage4"}),
    ("efficientformer", "v1_tiny_vit1", "efficientformer", ("class",),
     {0: "network_0", 1: "network_2", 2: "network_4", 3: "network_6"}),
    ("driver", "tiny", "driver", (), {1: "features"}),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "case", "name", "others", "held"), HELD, ids=lambda each: str(each)[:20])
def test_maps_are_the_published_codes(
    folder: str, case: str, name: str, others: tuple[str, ...], held: dict[int, str]
) -> None:
    golden = Case(CASES / folder / f"{case}.json")
    config = {key: value for key, value in golden.config.items() if key not in others}
    if name == "svt":
        config["norm_eps"] = 1e-6
    backbone = tersor.models.load(name, golden.state_dict(), features_only=True, out_indices=[*held], **config)
    with torch.no_grad():
        maps = backbone(*golden.inputs().values())
    for found, output in zip(maps, held.values(), strict=True):
        tokens = len(golden._outputs[output]["shape"]) == 3
        golden.check(output, found.flatten(2).transpose(1, 2) if tokens else found)


HEADS = (
    "ats",
    "vit",
    "nvit",
    "shvit",
    "efficientformer",
    "svt",
    "mobilevit",
    "driver",
)  # one of each kind of head and stem


@pytest.mark.parametrize("info", [info for info in CLASSIFIERS if info.system in HEADS], ids=named)
def test_a_checkpoint_serves_other_classes_and_one_channel(info: ModelInfo) -> None:
    """A grey picture gives the head what it gave as three equal colours; the new head is fresh."""
    torch.manual_seed(0)
    model = tersor.models.create(info.system, **info.small).eval()
    small = {key: value for key, value in info.small.items() if key != "num_classes"}
    if info.system == "nvit":  # its first layer sees unfolded patches, so one channel is another model
        small["in_chans"], model = 1, tersor.models.create(info.system, **info.small, in_chans=1).eval()
    other = tersor.models.load(info.system, model.state_dict(), **{**small, "num_classes": 3, "in_chans": 1})
    grey = input_of(other)
    with torch.no_grad():
        assert other(grey).shape == (2, 3)
        headless = tersor.models.load(info.system, model.state_dict(), **small, num_classes=0)
        assert headless(input_of(model)).shape[1] != 10
        colours = grey.expand(-1, 3, *grey.shape[2:])
        fresh = {
            key: value for key, value in other.state_dict().items() if model.state_dict()[key].shape != value.shape
        }
        assert fresh
        if hasattr(model, "features"):
            for each, same in zip(other.features(grey), headless.features(colours), strict=True):
                torch.testing.assert_close(each, same, rtol=1e-3, atol=1e-3 * float(same.abs().max()))


def test_a_checkpoint_without_its_head_is_still_refused() -> None:
    info = tersor.models.find("shvit_s1")
    state = tersor.models.create("shvit", **info.small).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("head")}
    with pytest.raises(TersorError, match=r"missing \(head"):
        tersor.models.load("shvit", state, **info.small)


def test_more_channels_repeat_the_colours_and_keep_the_sum() -> None:
    info = tersor.models.find("shvit_s1")
    model = tersor.models.create("shvit", **info.small)
    five = tersor.models.load("shvit", model.state_dict(), **info.small, in_chans=5)
    first, wide = (next(iter(each.parameters())) for each in (model, five))
    torch.testing.assert_close(wide, first[:, [0, 1, 2, 0, 1]] * 3 / 5)
