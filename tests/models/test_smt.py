import pytest
import torch

import tersor.models
from tersor.errors import TersorError

SMALL = {
    "num_classes": 3,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 3, 1),
    "sa_num_heads": (-1, -1, 2, 4),
    "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
}


def test_third_stage_alternates_modulation_and_attention():
    model = tersor.models.create("smt", **SMALL)
    assert [type(block.attn).__name__ for block in model.block3] == ["Modulation", "Attention", "Modulation"]


def test_features_are_normed_maps_of_any_image_and_the_logits_come_from_the_last():
    model = tersor.models.create("smt", **SMALL).eval()
    image = torch.randn(1, 3, 75, 50)
    maps = model.features(image)
    assert [tuple(each.shape) for each in maps] == [(1, 8, 19, 12), (1, 16, 10, 6), (1, 24, 5, 3), (1, 32, 3, 2)]
    torch.testing.assert_close(maps[0].mean(1), torch.zeros(1, 19, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(image), model.head(maps[-1].mean((2, 3))))


def test_layer_scale_starts_at_its_value_and_weighs_both_branches():
    model = tersor.models.create("smt", **SMALL, use_layerscale=True, layerscale_value=0.0).eval()
    x = torch.randn(2, 12, 24)
    block = model.block3[1]
    assert torch.equal(block(x, 3, 4), x)
    with torch.no_grad():
        block.gamma_2 += 1
    torch.testing.assert_close(block(x, 3, 4), x + block.mlp(block.norm2(x), 3, 4))


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(TersorError, match="embed_dims of stage 1 10 is not a multiple of ca_num_heads 4"):
        tersor.models.create("smt", **(SMALL | {"embed_dims": (10, 16, 24, 32)}))
