"""EBWM beyond its golden cases: what an energy depends on, descent, second-order gradients, all kinds of step tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError

SMALL: dict[str, Any] = {
    "embedding_dim": 16,
    "num_transformer_blocks": 2,
    "multiheaded_attention_heads": 2,
    "mcmc_step_size": 1.0,
}
KINDS = ("default", "time_embed", "adaln", "adaln_zero")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("ebwm", **SMALL, ebt_type=request.param).double()
    for name, parameter in model.named_parameters():
        if "adaLN" in name:  # adaln_zero begins with closed gates
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_an_energy_sees_its_past_and_its_own_candidate_alone(model: nn.Module) -> None:
    frames, guesses = torch.randn(2, 1, 6, 16, dtype=torch.float64)
    before = model(frames, guesses, 1)
    for tensor, sees in ((frames, [3, 4, 5]), (guesses, [3])):
        tensor[:, 3] += 1
        changed = ((model(frames, guesses, 1) - before).abs() > 1e-9)[0, :, 0]
        assert changed.nonzero().flatten().tolist() == sees
        tensor[:, 3] -= 1


@torch.no_grad()
def test_energies_are_those_of_causal_runs_of_each_candidate_alone() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("ebwm", **SMALL).double()
    frames, guesses = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    together = model(frames, guesses)
    for t in range(5):
        x = torch.cat((frames[:, : t + 1], guesses[:, t : t + 1]), 1)
        for layer in model.transformer.layers:
            x = layer(x, x.shape[1], None)  # all are frames: ordinary causal attention
        alone = model.transformer.final_layer(model.transformer.norm(x[:, -1]))
        torch.testing.assert_close(alone, together[:, t])


def test_a_small_step_lowers_every_energy(model: nn.Module) -> None:
    frames, guesses = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        model.alpha.fill_(1e-3)
        before = model(frames, guesses)
    if model.config.ebt_type == "default":
        after, energies = model.think(frames, guesses, steps=1)
        torch.testing.assert_close(energies[0], before)
        assert (model(frames, after[0]) < before).all()
    made, energies = model.think(frames, guesses, steps=5)
    assert len(made) == len(energies) == 5
    assert not made[-1].requires_grad


def test_the_loss_is_differentiated_through_the_descent() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("ebwm", **SMALL).double()
    frames, start = torch.randn(1, 4, 16, dtype=torch.float64), torch.randn(1, 3, 16, dtype=torch.float64)
    weight = model.transformer.layers[0].attention.wv.weight
    model.training_loss(frames, start)["loss"].backward()
    second_start = model.think(frames[:, :-1], start, steps=1)[0][0]  # constant: guesses are detached between steps

    def loss_with(h: float) -> Tensor:
        with torch.no_grad():
            weight[2, 3] += h
        ends = [model.think(frames[:, :-1], begin, steps=1)[0][0] for begin in (start, second_start)]
        with torch.no_grad():
            weight[2, 3] -= h
        return torch.stack([nn.functional.smooth_l1_loss(end, frames[:, 1:]) for end in ends]).mean()

    assert weight.grad is not None
    numeric = (loss_with(1e-5) - loss_with(-1e-5)) / 2e-5
    torch.testing.assert_close(weight.grad[2, 3], numeric, rtol=1e-5, atol=1e-10)


def test_without_detaching_earlier_steps_learn_too() -> None:
    gradients = []
    frames, start = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    for no_detach in (False, True):
        torch.manual_seed(0)
        model = tersor.models.create("ebwm", **SMALL, no_mcmc_detach=no_detach, truncate_mcmc=True)
        losses = model.training_loss(frames, start)
        assert losses["loss"] == losses["final_step_loss"]
        losses["loss"].backward()
        gradients.append(model.alpha.grad)
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_clamped_guess_moves_no_further_than_allowed() -> None:
    torch.manual_seed(0)
    config = {**SMALL, "mcmc_step_size": 1e4, "clamp_futures_grad": True, "clamp_futures_grad_max_change": 0.5}
    model = tersor.models.create("ebwm", **config)
    frames, start = torch.randn(2, 1, 4, 16)
    moved = (model.think(frames, start, steps=1)[0][0] - start).abs().max()
    torch.testing.assert_close(moved, torch.tensor(0.5))


@torch.no_grad()
@pytest.mark.parametrize("start", ["zeros", "most_recent_embedding", "random_noise"])
def test_thinking_begins_where_it_is_told_and_noise_is_drawn(start: str) -> None:
    model = tersor.models.create("ebwm", **SMALL, denoising_initial_condition=start, langevin_dynamics_noise=0.1)
    frames = torch.randn(1, 4, 16)
    guess = model.first_guess(frames, torch.Generator().manual_seed(1))
    expected = {"zeros": torch.zeros_like(frames), "most_recent_embedding": frames}
    if start in expected:
        assert torch.equal(guess, expected[start])
    first, again, other = (
        model.think(frames, guess, generator=torch.Generator().manual_seed(s))[0][-1] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loads_a_training_checkpoint_with_its_image_encoder() -> None:
    model = tersor.models.create("ebwm", **SMALL)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["model.image_encoder.patch_embed.weight"] = torch.ones(2)
    again = tersor.models.load("ebwm", state, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_refuses_unequal_streams() -> None:
    model = tersor.models.create("ebwm", **SMALL)
    with pytest.raises(TersorError, match=r"\[1, 3, 16\]"):
        model(torch.randn(1, 4, 16), torch.randn(1, 3, 16))
