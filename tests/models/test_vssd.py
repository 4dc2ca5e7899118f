"""VSSD beyond its golden cases: the operator against the causal kernel, the modes without published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError
from tersor.kernels.ssd import non_causal, ssd

SMALL = tersor.models.list("vssd_micro")[0].small


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("vssd", **{**SMALL, **overrides}).eval()


def test_all_tokens_read_the_causal_kernels_last_state() -> None:
    torch.manual_seed(0)
    x, dt, B, C = torch.randn(2, 70, 4, 3), torch.rand(2, 70, 4), torch.randn(2, 70, 1, 5), torch.randn(2, 70, 1, 5)
    _, state = ssd(x, dt, torch.zeros(4), B, C)
    expected = torch.einsum("bhpn,bln->blhp", state, C[:, :, 0])
    torch.testing.assert_close(non_causal(x, dt, B, C), expected, rtol=1e-4, atol=1e-4)


def test_the_operator_knows_no_order() -> None:
    torch.manual_seed(0)
    x, dt, B, C, D = torch.randn(1, 9, 4, 3), torch.rand(1, 9, 4), *torch.randn(2, 1, 9, 2, 5), torch.randn(4)
    order = torch.randperm(9)
    mixed = non_causal(x[:, order], dt[:, order], B[:, order], C[:, order], D=D)
    torch.testing.assert_close(mixed, non_causal(x, dt, B, C, D=D)[:, order])


def test_the_causal_scan_sees_only_earlier_tokens_and_half_of_it_turned_sees_all() -> None:
    def reached(**overrides: Any) -> torch.Tensor:
        """Which tokens of a row feel a change of the fifth; the convolution alone reaches one token on."""
        mixer = small(linear_attn_duality=False, attn_types=("mamba2",) * 4, **overrides).layers[1].blocks[0].attn
        x = torch.randn(1, 1, 9, 16)
        changed = x.clone()
        changed[:, :, 4] += 1
        with torch.no_grad():
            return (mixer(x) - mixer(changed)).abs().amax((0, 1, 3)) > 0

    assert reached().tolist() == [False] * 3 + [True] * 6
    assert reached(bidirection=True, ssd_ngroups=2).all()


def test_a_classifiers_checkpoint_makes_a_backbone_whose_maps_are_the_features_normalised() -> None:
    model = small(lepe=True)
    backbone = tersor.models.load("vssd", model.state_dict(), **{**SMALL, "out_indices": (1, 3), "lepe": True})
    image = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        maps, features = backbone(image), model.features(image)
    assert [list(each.shape) for each in features] == [[1, 8, 13, 18], [1, 16, 7, 9], [1, 32, 4, 5], [1, 64, 2, 3]]
    for ours, raw in zip(maps, (features[1], features[3]), strict=True):
        expected = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"num_heads": (2, 4, 8)}, "num_heads has 3"),
        ({"ssd_ngroups": 3}, "ssd_ngroups 3"),
        ({"attn_types": ("mamba2", "mamba3", "mamba2", "standard")}, "mamba3"),
        ({"bidirection": True, "ssd_ngroups": 2}, "linear_attn_duality"),
        ({"out_indices": (4,)}, "not 4"),
    ],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        small(**overrides)
