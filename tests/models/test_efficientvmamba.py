"""EfficientVMamba beyond its golden cases: the quarters, older checkpoints, the backbone."""

from __future__ import annotations

import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.efficientvmamba import SS2D, atrous_merge, atrous_scan

SMALL = tersor.models.list("efficientvmamba_t")[0].small


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 1), (2, 3)])
def test_the_merge_undoes_the_scan(height: int, width: int) -> None:
    x = torch.randn(2, height, width, 3)
    assert torch.equal(atrous_merge(atrous_scan(x), height, width), x)


def test_a_pixel_reaches_later_pixels_of_its_quarter_and_its_neighbours_through_the_convolution() -> None:
    torch.manual_seed(0)
    mixer, x = SS2D(8), torch.randn(1, 8, 8, 8)
    mixer.conv2d.weight.data.zero_()
    mixer.conv2d.weight.data[:, :, 1, 1] = 1  # no neighbours: what remains is the scans
    changed = x.clone()
    changed[0, 3, 2] += 1  # odd row, even column: by columns
    with torch.no_grad():
        felt = (mixer(x) - mixer(changed)).abs().amax(-1)[0] > 0
    later = {(row, column) for row in (1, 3, 5, 7) for column in (2, 4, 6) if (column, row) >= (2, 3)}
    assert {(row, column) for row, column in felt.nonzero().tolist()} == later


def test_takes_older_names_and_makes_a_backbone_of_a_classifiers_checkpoint() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("efficientvmamba", **SMALL).eval()
    older = {
        "module." + key.replace("patch_embed.0.", "patch_embed.proj.").replace(".op.", ".self_attention.")
        .replace("patch_embed.2.", "patch_embed.norm.").replace("blocks.0.norm.", "blocks.0.ln_1.")
        .removeprefix("classifier."): value
        for key, value in model.state_dict().items()
    }  # fmt: skip
    image = torch.randn(1, 3, 52, 36)
    again = tersor.models.load("efficientvmamba", older, **SMALL)
    backbone = tersor.models.load("efficientvmamba", older, **SMALL, out_indices=(0, 3))
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
        assert [list(each.shape) for each in backbone(image)] == [[1, 8, 13, 9], [1, 64, 2, 2]]


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(TersorError, match="four stages"):
        tersor.models.create("efficientvmamba", depths=(2, 2))
    with pytest.raises(TersorError, match="v3"):
        tersor.models.create("efficientvmamba", downsample_version="v3")
    model = tersor.models.create("efficientvmamba", **{**SMALL, "downsample_version": "v2"})
    with pytest.raises(TersorError, match="at least 32 x 32 pixels, not 16 x 64"):
        model(torch.randn(1, 3, 16, 64))
