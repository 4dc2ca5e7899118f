from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.associative.hopfield import (
    Hopfield,
    HopfieldBags,
    HopfieldBagsConfig,
    HopfieldConfig,
    HopfieldDecoderLayer,
    HopfieldEncoderLayer,
    HopfieldLayer,
    HopfieldLayerConfig,
    HopfieldPooling,
    HopfieldPoolingConfig,
    energy,
    update,
)

PURE: dict[str, Any] = {  # patterns in, patterns out: no parameters at all
    "stored_pattern_as_static": True,
    "state_pattern_as_static": True,
    "pattern_projection_as_static": True,
    "normalize_stored_pattern": False,
    "normalize_state_pattern": False,
    "normalize_pattern_projection": False,
    "disable_out_projection": True,
}


def pure(size: int, **config: Any) -> Hopfield:
    layer = Hopfield(HopfieldConfig(input_size=size, hidden_size=size, **PURE, **config)).eval()
    assert not list(layer.parameters())
    return layer


def patterns(count: int, size: int) -> Tensor:
    return torch.randn(1, count, size, generator=torch.Generator().manual_seed(0))


def test_a_stored_pattern_is_retrieved_from_a_noisy_one_in_one_step() -> None:
    stored = patterns(50, 64)
    state = stored + 0.3 * torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(1))
    assert (pure(64, scaling=4.0)(state, stored) - stored).abs().max() < 1e-3


def test_a_single_stored_pattern_is_returned_exactly() -> None:
    stored = patterns(1, 8)
    assert torch.equal(pure(8)(patterns(5, 8), stored), stored.expand(-1, 5, -1))


def test_a_small_beta_averages_over_all_patterns() -> None:
    stored = patterns(9, 8)
    retrieved = pure(8, scaling=1e-6)(patterns(2, 8), stored)
    torch.testing.assert_close(retrieved, stored.mean(1, keepdim=True).expand(-1, 2, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 4.0])
def test_each_update_lowers_the_energy_down_to_a_fixed_point(beta: float) -> None:
    stored, state = patterns(10, 16).double(), 2 * patterns(30, 16).double().flip(-1)
    energies = []
    for _ in range(300):
        energies.append(energy(state, stored, beta))
        state = update(state, stored, beta)
    assert (torch.stack(energies).diff(dim=0) <= 1e-12).all()
    assert (update(state, stored, beta) - state).abs().max() < 1e-4


def test_iterating_to_convergence_ends_in_a_fixed_point_of_the_update() -> None:
    stored, state = patterns(6, 8), patterns(20, 8).flip(-1)
    found = pure(8, scaling=0.8, update_steps_max=None, update_steps_eps=1e-7)(state, stored)
    torch.testing.assert_close(update(found, stored, 0.8), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_layer_without_parameters_is_the_update_rule(steps: int) -> None:
    stored, state = patterns(6, 8), patterns(3, 8).flip(-1)
    expected = state
    for _ in range(steps + 1):
        expected = update(expected, stored, 0.7)
    found = pure(8, scaling=0.7, update_steps_max=steps, update_steps_eps=0.0)(state, stored)
    torch.testing.assert_close(found, expected)


def test_one_update_is_scaled_dot_product_attention() -> None:
    torch.manual_seed(0)
    layer = Hopfield(HopfieldConfig(input_size=12, num_heads=3)).eval()
    core, x = layer.association_core, torch.randn(2, 7, 12)
    for linear in (core.q_proj, core.k_proj, core.v_proj):
        torch.nn.init.normal_(linear.weight)
    q, k, v = (
        linear(F.layer_norm(x, (12,))).unflatten(-1, (3, 4)).transpose(1, 2)
        for linear in (core.q_proj, core.k_proj, core.v_proj)
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), core.out_proj(attended))


def test_the_order_of_stored_patterns_does_not_matter() -> None:
    torch.manual_seed(0)
    layer = HopfieldPooling(HopfieldPoolingConfig(input_size=12, num_heads=2, quantity=3, update_steps_max=2)).eval()
    stored = torch.randn(2, 9, 12)
    torch.testing.assert_close(layer(stored), layer(stored[:, torch.randperm(9)]))


@pytest.mark.parametrize("steps", [0, 2, None])
def test_padding_is_as_if_it_were_not_there(steps: int | None) -> None:
    torch.manual_seed(0)
    layer = Hopfield(HopfieldConfig(input_size=12, num_heads=2, update_steps_max=steps)).eval()
    state, stored = torch.randn(2, 4, 12), torch.randn(2, 9, 12)
    padded = torch.arange(9).expand(2, 9) >= 6
    torch.testing.assert_close(layer(state, stored, padding_mask=padded), layer(state, stored[:, :6]))
    forbidden = padded[0].expand(4, 9)
    torch.testing.assert_close(layer(state, stored, association_mask=forbidden), layer(state, stored[:, :6]))


@pytest.mark.parametrize(
    "config",
    [
        {"concat_bias_pattern": True},
        {"add_zero_association": True},
        {"concat_bias_pattern": True, "add_zero_association": True, "normalize_hopfield_space": True},
        {"normalize_hopfield_space": True, "normalize_hopfield_space_affine": True},
        {"pattern_projection_as_connected": True, "pattern_size": 5},
        {"stored_pattern_as_static": True, "hidden_size": 12},
        {"state_pattern_as_static": True, "hidden_size": 12},
        {"pattern_projection_as_static": True, "hidden_size": 12},
        {"disable_out_projection": True, "input_bias": False},
        {"scaling": (0.5, 2.0), "update_steps_max": 3, "association_activation": "tanh"},
        {"dropout": 0.5, "stored_pattern_size": 7, "pattern_projection_size": 9, "output_size": 4},
    ],
    ids=str,
)
def test_every_option_runs_and_keeps_shapes_in_both_layouts(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = Hopfield(HopfieldConfig(input_size=12, num_heads=2, **config)).eval()
    inputs = layer.example_inputs(3)
    y = layer(**inputs)
    assert y.shape == (3, 5, layer.config.result_size)
    swapped = Hopfield(HopfieldConfig(input_size=12, num_heads=2, batch_first=False, **config)).eval()
    swapped.load_state_dict(layer.state_dict())
    torch.testing.assert_close(swapped(**{k: x.transpose(0, 1) for k, x in inputs.items()}).transpose(0, 1), y)


def test_a_packed_checkpoint_and_a_split_one_are_the_same() -> None:
    torch.manual_seed(0)
    layer = tersor.models.create("hopfield", input_size=12, num_heads=3)
    own = layer.state_dict()
    core = "association_core."
    rest = {k: v for k, v in own.items() if not any(f"{each}_proj." in k for each in "qkv")}
    biases = {f"{core}in_proj_bias": torch.cat([own[f"{core}{each}_proj.bias"] for each in "qkv"])}
    weights = [own[f"{core}{each}_proj.weight"] for each in "qkv"]
    packed = {**rest, **biases, f"{core}in_proj_weight": torch.cat(weights)}
    split = {**rest, **biases, **{f"{core}{e}_proj_weight": w for e, w in zip("qkv", weights, strict=True)}}
    inputs = layer.example_inputs(2)
    for checkpoint in (packed, split, own):
        loaded = tersor.models.load("hopfield", checkpoint, input_size=12, num_heads=3)
        assert torch.equal(loaded(**inputs), layer.eval()(**inputs))


def test_a_static_pattern_goes_to_the_heads_in_the_published_order() -> None:
    """Head h of sample b gets the pattern of sample (b H + h) mod B, with and without a normalised space."""
    torch.manual_seed(0)
    stored, state = torch.randn(3, 7, 12), torch.randn(3, 5, 12)
    config: dict[str, Any] = {"stored_pattern_as_static": True, "state_pattern_as_static": True, "scaling": 0.3}
    for normalised in (False, True):
        layer = Hopfield(
            HopfieldConfig(input_size=12, hidden_size=12, num_heads=2, normalize_hopfield_space=normalised, **config)
        ).eval()
        one = Hopfield(HopfieldConfig(input_size=12, hidden_size=12, normalize_hopfield_space=normalised, **config))
        found = layer.association(state, stored)
        for b in range(3):
            for h in range(2):
                n = (2 * b + h) % 3
                torch.testing.assert_close(found[b, h], one.association(state[n : n + 1], stored[n : n + 1])[0, 0])


def test_heads_have_limits_and_thresholds_of_their_own() -> None:
    torch.manual_seed(0)
    layer = Hopfield(HopfieldConfig(input_size=12, num_heads=2, scaling=3.0, update_steps_max=(0, -1))).eval()
    for linear in (layer.association_core.q_proj, layer.association_core.k_proj):
        torch.nn.init.normal_(linear.weight)
    x = torch.randn(2, 7, 12)
    found = layer.association(x)
    for head, steps in ((0, 0), (1, None)):
        other = Hopfield(HopfieldConfig(input_size=12, num_heads=2, scaling=3.0, update_steps_max=steps)).eval()
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(found[:, head], other.association(x)[:, head])
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3


def test_looking_up_learns_a_table() -> None:
    torch.manual_seed(0)
    layer = HopfieldLayer(HopfieldLayerConfig(input_size=8, hidden_size=16, quantity=40, output_size=3, scaling=1.0))
    keys, values = torch.randn(20, 1, 8), torch.randn(20, 1, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.mse_loss(layer(keys), values).backward()
        optimizer.step()
    assert F.mse_loss(layer(keys), values) < 0.2 * values.var()


def test_bags_with_a_given_bit_pattern_are_told_from_others() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randint(2, (8,), generator=generator).float()

    def bags(count: int) -> tuple[Tensor, Tensor]:
        bag, label = torch.randint(2, (count, 12, 8), generator=generator).float(), torch.arange(count) % 2
        there = (bag == signal).all(-1)
        bag[there] = 1 - signal
        bag[label == 1, 3] = signal
        return 2 * bag - 1, label

    torch.manual_seed(0)
    model = HopfieldBags(HopfieldBagsConfig(input_size=8, hidden_size=8, num_heads=4, scaling=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(250):
        bag, label = bags(64)
        optimizer.zero_grad()
        F.cross_entropy(model(bag), label).backward()
        optimizer.step()
    bag, label = bags(512)
    assert (model.eval()(bag).argmax(-1) == label).float().mean() > 0.95


def test_encoder_and_decoder_layers_use_associations() -> None:
    encoder = HopfieldEncoderLayer(Hopfield(HopfieldConfig(input_size=12, num_heads=2)), 24).eval()
    decoder = HopfieldDecoderLayer(
        Hopfield(HopfieldConfig(input_size=12, num_heads=2)), Hopfield(HopfieldConfig(input_size=12)), 24
    ).eval()
    memory = encoder(torch.randn(2, 9, 12))
    assert decoder(torch.randn(2, 5, 12), memory).shape == (2, 5, 12)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_heads": 5}, "5 heads"),
        ({"num_heads": 2, "scaling": (1.0,)}, "scaling"),
        ({"update_steps_max": -1}, "-1"),
        ({"association_activation": "swoosh"}, "'swoosh'"),
    ],
)
def test_refuses_what_cannot_work(config: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        HopfieldConfig(input_size=12, **config)
