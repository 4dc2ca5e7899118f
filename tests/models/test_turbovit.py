from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.turbovit import Costs, TurboViTConfig, costs, max_pool, search, unrolled_order

SMALL = {"img_size": (64, 96), "num_classes": 3, "embed_dim": 8, "stages": (1, 1, 2, 1), "mlp_ratio": 2.0}
PAPER = Costs(parameters=12_700_000, multiply_adds=2_210_000_000)


def small(**overrides):
    torch.manual_seed(0)
    return tersor.models.create("turbovit", **(SMALL | overrides)).eval()


@pytest.mark.parametrize("grid", [(8, 8), (16, 24)])
def test_pooling_in_the_unrolled_order_is_max_pooling_of_the_map_at_every_level(grid):
    order = unrolled_order(grid, (2, 2), 3)
    assert order.sort().values.tolist() == list(range(grid[0] * grid[1]))
    image = torch.randn(1, 5, *grid)
    x = image.flatten(2).transpose(1, 2)[:, order]
    for level in (1, 2, 3):
        x, image = max_pool(x, 4), F.max_pool2d(image, 2)
        back = unrolled_order(image.shape[2:], (2, 2), 3 - level).argsort()
        assert torch.equal(x[:, back].transpose(1, 2).reshape(image.shape), image)


def test_mask_unit_attention_is_attention_in_windows_of_the_map():
    model = small()
    attention = model.blocks[0].attn
    image = torch.randn(2, 16, 24, 8)  # the first stage's map, in windows of 8 x 8
    x = image.flatten(1, 2)[:, model.order]
    got = attention(x)[:, model.order.argsort()].reshape(image.shape)
    for row in (0, 8):
        for column in (0, 8, 16):
            window = image[:, row : row + 8, column : column + 8].flatten(1, 2)
            q, k, v = attention.qkv(window).chunk(3, -1)
            expected = attention.proj((q @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v)
            torch.testing.assert_close(got[:, row : row + 8, column : column + 8].flatten(1, 2), expected)


def test_before_the_first_global_block_a_unit_sees_itself_alone():
    model = small()
    image = torch.randn(1, 3, 64, 96)
    changed = image.clone()
    changed[..., 8:24, 40:56] += 1  # inside the unit of rows 0 to 31, columns 32 to 63
    difference = (model.features(changed)[1] - model.features(image)[1]).abs().amax((0, 1))  # (8, 12): 4 x 4 a unit
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[:4, 4:8] = True
    assert (difference[inside] > 0).any()
    assert (difference[~inside] == 0).all()


def test_one_unit_without_pooling_is_ordinary_attention():
    model = small(mask_unit_attn=(False, False, False, False))
    attention, x = model.blocks[0].attn, torch.randn(1, 384, 8)
    q, k, v = attention.qkv(x).chunk(3, -1)
    expected = attention.proj((q @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v)
    torch.testing.assert_close(attention(x), expected)


def test_features_are_in_the_order_of_the_image():
    model = small(q_pool=2)
    maps = model.features(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 4, 6)]


@pytest.mark.parametrize(
    ("width", "stages", "parameters", "multiply_adds"),
    [
        (64, (1, 2, 7, 2), 12_659_752, 2.25e9),
        (64, (1, 2, 8, 2), 13.4e6, 2.42e9),
        (64, (1, 1, 9, 2), 14.0e6, 2.44e9),
        (64, (1, 2, 9, 1), 11.1e6, 2.44e9),
        (96, (1, 2, 7, 2), 27_910_216, 4.90e9),
    ],
)
def test_costs_are_those_of_the_known_designs(width, stages, parameters, multiply_adds):
    cost = costs(TurboViTConfig(embed_dim=width, stages=stages))
    assert cost.parameters == pytest.approx(parameters, rel=0 if isinstance(parameters, int) else 5e-3)
    assert cost.multiply_adds == pytest.approx(multiply_adds, rel=5e-3)


def test_costs_count_a_design_of_free_widths_heads_and_ratios():
    design = {"dims": (24, 24, 16, 48), "heads": (1, 3, 2, 4), "mlp_ratios": (2.0, 3.0, 1.5, 4.0)}
    model = small(**design)
    assert costs(model.config).parameters == sum(p.numel() for p in model.parameters())
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3)


def test_search_keeps_to_the_budget_and_improves_the_score():
    def capacity(design):
        return costs(design).parameters

    found = search(capacity, PAPER, proposals=300)
    assert all(costs(design).within(PAPER) and 2 * sum(design.stages[2:]) > sum(design.stages) for _, design in found)
    scores = [score for score, _ in found]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.95 * PAPER.parameters
    assert len(set(found)) == len(found)
    assert [score for score, _ in search(capacity, PAPER, proposals=300)] == scores  # of the same seed


def test_original_names_of_hiera_checkpoints_are_mapped():
    model = small()
    state = {
        key.replace("head.norm.", "norm.").replace("head.fc.", "head.projection."): value
        for key, value in model.state_dict().items()
    }
    image = torch.randn(1, 3, 64, 96)
    again = tersor.models.load("turbovit", state, **SMALL)
    torch.testing.assert_close(again(image), model(image))


def test_refuses_sizes_that_do_not_divide_and_units_that_are_used_up():
    with pytest.raises(TersorError, match="img_size 100 does not go, multiples of 32 do"):
        replace(TurboViTConfig(), img_size=(224, 100))
    with pytest.raises(TersorError, match="used up before stage 3"):
        TurboViTConfig(mask_unit_size=(2, 2), mask_unit_attn=(True, True, True, True))
    with pytest.raises(TersorError, match="images of 64 x 96 pixels, not 96 x 64"):
        small()(torch.zeros(1, 3, 96, 64))
