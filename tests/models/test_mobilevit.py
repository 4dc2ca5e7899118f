"""MobileViT beyond its golden cases: features, sizes, refusals."""

from __future__ import annotations

import pytest
import torch

import tersor.models
from tersor.errors import TersorError

SMALL = {info.system: info.small for info in tersor.models.list("*mobilevit*")}


@pytest.mark.parametrize(("system", "sides"), [("mobilevit", [44, 22, 11, 6, 3]), ("mobilevitv2", [44, 22, 12, 6, 4])])
def test_odd_maps_are_restored_in_v1_and_stay_larger_in_v2(system: str, sides: list[int]) -> None:
    model = tersor.models.create(system, **{**SMALL[system], "in_chans": 4, "num_classes": 0}).eval()
    image = torch.randn(1, 4, 88, 88)
    with torch.no_grad():
        assert [list(each.shape[2:]) for each in model.features(image)] == [[side, side] for side in sides]
        assert model(image).shape == (1, 32 if system == "mobilevit" else 64)


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(TersorError, match="num_heads 5"):
        tersor.models.create("mobilevit", num_heads=5)
    with pytest.raises(TersorError, match=r"5 positive widths, not \(16, 24\)"):
        tersor.models.create("mobilevit", widths=(16, 24))
    model = tersor.models.create("mobilevitv2", **SMALL["mobilevitv2"])
    with pytest.raises(TersorError, match="1, 32, 32"):
        model(torch.randn(1, 1, 32, 32))
