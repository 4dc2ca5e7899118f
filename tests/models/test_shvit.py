"""SHViT beyond its golden cases: fusing, both checkpoint layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden.harness import Case
from torch import Tensor, nn

import tersor.models

CASES = Path(__file__).parents[1] / "golden" / "shvit"


def loaded(name: str) -> tuple[Case, nn.Module]:
    case = Case(CASES / f"{name}.json")
    return case, tersor.models.load("shvit", case.state_dict(), **case.config)


@pytest.mark.parametrize("name", ["shvit_s1", "tiny_iss", "tiny_sss_distill"])
def test_the_fused_model_computes_the_same(name: str) -> None:
    case, model = loaded(name)
    fused = model.fuse()
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in fused.modules())
    with torch.no_grad():
        case.check("logits", fused(**case.inputs()), tolerance=1e-5)
    if name == "shvit_s1":
        assert sum(p.numel() for p in fused.parameters()) == 6_308_660


def timm_name(key: str) -> str:
    """The published key in timm's layout, written the other way round than in the model's file."""
    stage, _, rest = key.partition(".")
    if not stage.startswith("blocks"):
        return key
    index = int(stage[-1]) - 1
    first, _, rest = rest.partition(".")
    if index == 0 or int(first) > 2:
        return f"stages.{index}.blocks.{int(first) - (0 if index == 0 else 3)}.{rest}"
    if first == "1":
        return f"stages.{index}.downsample.2.{rest}"
    second, _, rest = rest.partition(".")
    return f"stages.{index}.downsample.{int(second) + (0 if first == '0' else 3)}.{rest}"


def test_takes_timm_names_and_two_dimensional_pointwise_weights() -> None:
    case, model = loaded("tiny_iss")

    def flat(value: Tensor) -> Tensor:
        return value.flatten(1) if value.dim() == 4 and value.shape[2:] == (1, 1) and value.shape[1] > 1 else value

    state = {timm_name(key): flat(value) for key, value in case.state_dict().items()}
    assert not any(re.match(r"blocks\d", key) for key in state)
    again = tersor.models.load("shvit", state, **case.config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_fresh_block_is_the_identity() -> None:
    model = tersor.models.create("shvit", num_classes=3, embed_dim=(16, 24, 32), partial_dim=(4, 5, 7)).eval()
    x = torch.randn(1, 16, 7, 5)
    assert torch.equal(model.blocks1(x), x)


def test_without_classes_it_returns_features_and_training_returns_both_heads() -> None:
    sizes = {"embed_dim": (16, 24, 32), "partial_dim": (4, 5, 7)}
    image = torch.randn(2, 3, 96, 64)
    assert tersor.models.create("shvit", num_classes=0, **sizes)(image).shape == (2, 32)
    both = tersor.models.create("shvit", num_classes=5, distillation=True, **sizes)(image)
    assert [logits.shape for logits in both] == [(2, 5), (2, 5)]
