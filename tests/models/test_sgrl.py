"""SET beyond its golden cases: what turns with the world, what does not, and bodies of other limbs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.control.morphology import limb_places, limb_relation


def build(**config: int) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("sgrl", **{"ninp": 12, "nhid": 16, "nlayers": 2, **config}).eval()


@pytest.fixture(scope="module")
def actor() -> nn.Module:
    return build()


def example(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.example_inputs(3).items()}


def turned(src: Tensor, R: Tensor, vectors: slice = slice(0, 8)) -> Tensor:
    """Every limb's vectors (those chosen) turned by R [3, 3]."""
    parts = src[..., :24].unflatten(-1, (8, 3)).clone()
    parts[..., vectors, :] = parts[..., vectors, :] @ R.mT
    return torch.cat((parts.flatten(-2), src[..., 24:]), -1)


def about_gravity(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def any_turn(seed: int) -> Tensor:
    """In O(3): a rotation, or with a reflection."""
    made = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=made))[0]


TURNS = [about_gravity(angle) for angle in (0.3, 1.9, math.pi, 4.4, 5.5)] + [any_turn(seed) for seed in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("R", TURNS, ids=["gravity"] * 5 + ["any"] * 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_turning_the_world_turns_the_vectors_and_changes_no_torque(
    actor: nn.Module, R: Tensor, dtype: torch.dtype
) -> None:
    model, inputs, R = actor.to(dtype), example(actor, dtype), R.to(dtype)
    there = {**inputs, "src": turned(inputs["src"], R)}
    allowed = 1e-5 if dtype == torch.float32 else 1e-10
    (Z, h), (Z_there, h_there) = model.encode(**inputs), model.encode(**there)
    assert (R @ Z - Z_there).abs().max() <= allowed * Z.abs().max()
    assert (h - h_there).abs().max() <= allowed * h.abs().max()
    out = model(**inputs)
    assert (out - model(**there)).abs().max() <= allowed * out.abs().max()


@torch.no_grad()
def test_a_critic_and_one_without_the_raw_state_do_not_see_the_turn_either() -> None:
    for config in ({"output_size": 1, "feature_size": 44}, {"condition_decoder": 0, "transformer_norm": 0}):
        model = build(**config).double()
        inputs = example(model)
        there = {**inputs, "src": turned(inputs["src"], about_gravity(1.0))}
        torch.testing.assert_close(model(**there), model(**inputs), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_gravity_and_target_are_seen(actor: nn.Module) -> None:
    """When they stay and the rest turns, torques change, unless the turn keeps both: a reflection at their plane."""
    model, inputs = actor.double(), example(actor)
    out = model(**inputs)

    def without_them(R: Tensor) -> Tensor:
        src = turned(turned(inputs["src"], R, slice(0, 1)), R, slice(3, 8))
        return (model(**{**inputs, "src": src}) - out).abs().max() / out.abs().max()

    assert without_them(about_gravity(1.0)) > 1e-4  # turns the target's direction among the rest
    assert without_them(any_turn(0)) > 1e-4
    mirror = torch.diag(torch.tensor([1, -1, 1], dtype=torch.float64))  # keeps x, the target's, and z
    assert without_them(mirror) < 1e-10


@torch.no_grad()
def test_limbs_have_no_order(actor: nn.Module) -> None:
    model, inputs, order = actor.double(), example(actor), torch.tensor([3, 0, 4, 1, 2])
    shuffled = {
        "src": inputs["src"][order],
        "traversals": inputs["traversals"][:, order],
        "relation": inputs["relation"][order][:, order],
    }
    torch.testing.assert_close(model(**shuffled), model(**inputs)[order], rtol=1e-9, atol=1e-12)


def test_a_file_with_actor_and_critics_loads_into_either() -> None:
    actor, critic = build(), build(output_size=1, feature_size=44)
    file = {f"actor.{k}": v for k, v in actor.state_dict().items()}
    file |= {f"critic1.{k}": v for k, v in critic.state_dict().items()}
    file |= {f"critic2.{k}": v + 1 for k, v in critic.state_dict().items()}
    for model in (actor, critic):
        again = build(output_size=model.config.output_size, feature_size=model.config.feature_size)
        nn.init.zeros_(again.encoder.weight)
        again.load_state_dict(again.convert_checkpoint(file))
        assert again.encoder.weight.equal(model.encoder.weight)


def test_other_bodies() -> None:
    relation = limb_relation([-1])
    assert relation.tolist() == [[[1, 0, 0]]]
    relation = limb_relation([1, -1, 1])  # the torso need not be the first
    torch.testing.assert_close(relation[..., 0].sum(1), torch.ones(3))
    assert (relation[0, :, 2] * 3).round().tolist() == [0, 1, 2]
    assert limb_places([1, -1, 1], ["pre"]).tolist() == [[1, 0, 2]]
    assert relation[2, 1, 1] == pytest.approx(-(2**-0.5))


def test_refuses_what_cannot_work(actor: nn.Module) -> None:
    for parents, named in (([0, -1, -1], "one limb"), ([-1, 2, 1], "limb 1"), ([-1, 7], "limb 1")):
        with pytest.raises(TersorError, match=named):
            limb_relation(parents)
    with pytest.raises(TersorError, match="'post'"):
        limb_places([-1, 0], ["post"])
    with pytest.raises(TersorError, match="nhead"):
        build(nhead=4)
    inputs = example(actor)
    with pytest.raises(TersorError, match="41 features, src has 40"):
        actor.encode(**{**inputs, "src": inputs["src"][..., :40]})
    with pytest.raises(TersorError, match="critic does not act"):
        build(output_size=1).act(**inputs)
