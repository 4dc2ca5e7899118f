import torch

import tersor.models
from tersor.models.vision.stvit import from_cells, neighbours, super_tokens, to_cells, to_grid

SMALL = {
    "num_classes": 3,
    "embed_dim": (8, 8, 8, 8),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "stoken_size": (4, 2, 1, 1),
    "projection": 8,
    "mlp_ratio": 1.0,
}


def small(**overrides):
    torch.manual_seed(0)
    return tersor.models.create("stvit", **(SMALL | overrides)).eval()


def test_a_super_token_of_one_pixel_is_plain_attention():
    sta = small().layers[2].blocks[0].attn
    x = torch.randn(1, 8, 5, 4)
    assert torch.equal(sta(x), sta.stoken_refine(x))


def test_every_pixel_spreads_one_over_its_nine_neighbours():
    sta = small(n_iter=(3, 1, 1, 1)).layers[0].blocks[0].attn
    P, S = torch.randn(2, 6, 16, 8), torch.randn(2, 8, 2, 3)
    torch.testing.assert_close(sta.associate(P, S).sum(-1), torch.ones(2, 6, 16))


def test_super_tokens_of_a_constant_map_are_the_constant():
    sta = small().layers[0].blocks[0].attn
    P = torch.full((1, 20, 16, 8), 2.5)
    Q = sta.associate(P, torch.full((1, 8, 5, 4), 2.5))
    torch.testing.assert_close(super_tokens(P, Q, (5, 4)), torch.full((1, 8, 5, 4), 2.5))


def test_neighbours_outside_the_grid_take_a_part_of_the_softmax():
    sta = small().layers[0].blocks[0].attn
    P = torch.ones(1, 1, 16, 8)
    Q = sta.associate(P, torch.ones(1, 8, 1, 1))[0, 0, 0]  # a single cell: its neighbours' logits are 0
    centre = torch.tensor(8**0.5).exp()
    torch.testing.assert_close(Q[4], centre / (centre + 8))
    torch.testing.assert_close(Q[0], 1 / (centre + 8))


def test_neighbours_and_back_multiply_by_the_number_of_valid_neighbours():
    S = torch.randn(1, 3, 4, 5)
    counts = torch.full((4, 5), 9.0)
    counts[0], counts[-1] = 6, 6
    counts[:, 0], counts[:, -1] = counts[:, 0] * 2 / 3, counts[:, -1] * 2 / 3
    torch.testing.assert_close(to_grid(neighbours(S), (4, 5)), S * counts)


def test_cells_and_back_are_the_map():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(from_cells(to_cells(x, 4), 4, (2, 3)), x)
    assert torch.equal(to_cells(x, 4)[0, 1], x[0, :, :4, 4:8].flatten(1).t())


def test_no_gradient_goes_through_the_association():
    sta = small().layers[0].blocks[0].attn
    P = torch.randn(1, 4, 16, 8, requires_grad=True)
    with torch.no_grad():
        Q = sta.associate(P, torch.randn(1, 8, 2, 2))
    super_tokens(P, Q, (2, 2)).sum().backward()
    weight = to_grid(Q.sum(2)[..., None], (2, 2))
    expected = Q @ neighbours(1 / weight)  # linear in P with Q held fixed
    torch.testing.assert_close(P.grad, expected.expand_as(P))


def test_features_are_the_maps_before_each_halving():
    model = small()
    image = torch.randn(1, 3, 50, 41)
    maps = model.features(image)
    assert [tuple(each.shape[2:]) for each in maps] == [(13, 11), (7, 6), (4, 3), (2, 2)]
    pooled = torch.nn.functional.silu(model.norm(model.proj(maps[-1]))).mean((2, 3))
    torch.testing.assert_close(model(image), model.head(pooled))
