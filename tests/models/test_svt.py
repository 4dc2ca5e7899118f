import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.layers import dtcwt
from tersor.models.vision.svt import exchange, random_box, token_label_loss

SMALL = {
    "img_size": 32,
    "num_classes": 3,
    "stem_hidden_dim": 4,
    "embed_dims": (8, 8, 8, 8),
    "num_heads": (1, 1, 2, 2),
    "mlp_ratios": (1.0, 1.0, 1.0, 1.0),
    "depths": (1, 1, 1, 1),
}


def small(**overrides):
    torch.manual_seed(0)
    return tersor.models.create("svt", **(SMALL | overrides))


@pytest.mark.parametrize("size", [(16, 12), (2, 4), (56, 56)])
def test_inverse_of_the_transform_is_the_input(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(dtcwt.inverse(*dtcwt.forward(x)), x, atol=1e-6, rtol=0)


def test_odd_sides_are_filled_with_the_last_row_and_column():
    x = torch.randn(1, 1, 7, 5, dtype=torch.float64)
    back = dtcwt.inverse(*dtcwt.forward(x))
    torch.testing.assert_close(back[..., :7, :5], x, atol=1e-6, rtol=0)
    torch.testing.assert_close(back[..., 7, :5], x[..., 6, :], atol=1e-6, rtol=0)


def test_a_constant_has_no_high_frequencies():
    low, high = dtcwt.forward(torch.full((1, 1, 8, 8), 3.0))
    torch.testing.assert_close(low, torch.full((1, 1, 8, 8), 3.0))
    assert high.abs().max() < 1e-5


def test_stripes_are_strongest_in_the_band_of_their_direction():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    energy = [
        dtcwt.forward(torch.sin(1.8 * wave)[None, None])[1].square().sum((0, 1, 3, 4, 5))
        for wave in (rows, columns, rows + columns, rows - columns)
    ]
    horizontal, vertical, one, other = (set(each.topk(2).indices.tolist()) for each in energy)
    assert horizontal == {0, 5}  # 15 and 165 degrees
    assert vertical == {2, 3}  # 75 and 105
    assert {int(energy[2].argmax()), int(energy[3].argmax())} == {1, 4}  # 45 and 135
    assert one != other


def test_token_outputs_are_logits_and_a_box_and_the_loss_takes_them():
    model = small().train()
    image = model.example_inputs(4)["image"]
    outputs = model.token_outputs(image)
    assert outputs[0].shape == (4, 3)
    assert outputs[1].shape == (4, 1, 3)
    loss = token_label_loss(outputs, torch.rand(4, 3, 3).softmax(1))
    loss.backward()
    assert model.aux_head.weight.grad.abs().sum() > 0
    with pytest.raises(TersorError, match="token_label=True"):
        small(token_label=False).token_outputs(image)


def test_eval_adds_half_of_the_strongest_token():
    model = small().eval()
    image = torch.randn(1, 3, 64, 32)  # another size than its own: the low-frequency weight is resized
    x = model.features(image)[-1].flatten(2).transpose(1, 2)
    x = model.norm4(model.post_network[0](torch.cat((x.mean(1, keepdim=True), x), 1)))
    expected = model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:]).max(1).values
    torch.testing.assert_close(model(image), expected)


def test_box_is_exchanged_with_the_flipped_batch_and_back():
    x = torch.randn(3, 5, 4, 2)
    mixed = exchange(x, (1, 0, 3, 2))
    assert torch.equal(mixed[0, 1:3, :2], x[2, 1:3, :2])
    assert torch.equal(mixed[0, 3:], x[0, 3:])
    assert torch.equal(exchange(mixed, (1, 0, 3, 2)), x)
    for _ in range(20):
        x1, y1, x2, y2 = random_box(7, 5)
        assert 0 <= x1 <= x2 <= 7
        assert 0 <= y1 <= y2 <= 5


def test_channel_token_mixing_runs_at_its_own_size_and_refuses_another():
    model = small(mixing="channel_token", token_label=False)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(TersorError, match="first map of 8 x 8, not 16 x 16"):
        model(torch.randn(1, 3, 64, 64))


def test_refuses_an_image_whose_first_map_has_odd_sides():
    with pytest.raises(TersorError, match="multiples of 8, not 36 x 32"):
        small()(torch.randn(1, 3, 36, 32))
