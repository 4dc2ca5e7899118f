"""VDT beyond its golden cases: masks, samplers, what is given, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.data.video_masks import KINDS, VideoMasks, block_mask
from tersor.errors import TersorError
from tersor.train.diffusion import DiffusionConfig, GaussianDiffusion, respaced_steps

SMALL = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 1, "num_frames": 3}
MASKS = VideoMasks(frames=16, height=8, width=8)


def ideal(x0: Tensor, diffusion: GaussianDiffusion) -> object:
    """The model that knows x0: it returns the noise that leads from x0 to x, and the posterior's variance."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = diffusion.a[torch.searchsorted(diffusion.timestep_map, t)].to(x.dtype).reshape(-1, 1, 1, 1, 1)
        return torch.cat(((x - a.sqrt() * x0) / (1 - a).sqrt(), -torch.ones_like(x)), -3)

    return model


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samplers_reach_the_sample_that_an_ideal_model_knows(sampler: str) -> None:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(DiffusionConfig(timestep_respacing="20"))
    x0 = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    x = diffusion.sample(ideal(x0, diffusion), torch.randn_like(x0), sampler=sampler)  # type: ignore[arg-type]
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_ddim_with_eta_1_and_the_ancestral_sampler_have_the_same_mean() -> None:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(DiffusionConfig(timestep_respacing="7", learn_sigma=False, sigma_small=True))
    model = tersor.models.create("vdt", **SMALL, learn_sigma=False, zero_init=False).double().eval()
    start = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    drawn = [torch.randn_like(start) for _ in range(7)]
    results = [diffusion.sample(model, start, sampler="ddpm", noise=iter(drawn))]
    results.append(diffusion.sample(model, start, sampler="ddim", eta=1.0, noise=iter(drawn)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_given_latents_enter_clean_and_are_pasted_on_request() -> None:
    torch.manual_seed(0)
    diffusion, seen = GaussianDiffusion(DiffusionConfig(timestep_respacing="3")), []
    given, mask = torch.randn(1, 3, 4, 4, 4), torch.ones(1, 3, 4, 4)
    mask[:, 0] = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x[:, 0].clone(), int(t)))
        return torch.zeros(1, 3, 8, 4, 4)

    pasted = diffusion.sample(model, torch.randn_like(given), given=given, mask=mask, paste_given=True)
    assert [step for _, step in seen] == [999, 500, 0]
    assert all(torch.equal(frame, given[:, 0]) for frame, _ in seen)
    assert torch.equal(pasted[:, 0], given[:, 0])
    diffusion.losses(model, given, torch.tensor([1]), mask=mask)
    assert torch.equal(seen[-1][0], given[:, 0])


def test_all_tables_go_to_the_device() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig()).to("meta")
    assert {each.device.type for each in vars(diffusion).values() if isinstance(each, torch.Tensor)} == {"meta"}


def test_loss_of_the_ideal_model_is_zero() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    x0 = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    terms = diffusion.losses(ideal(x0, diffusion), x0, torch.tensor([10, 900]))  # type: ignore[arg-type]
    assert terms.loss.abs().max() < 1e-12


def test_untrained_model_returns_zeros_and_a_fixed_number_of_frames() -> None:
    model = tersor.models.create("vdt", **SMALL)
    assert not model(**model.example_inputs()).any()
    with pytest.raises(TersorError, match=r"latents \(batch, 3, 4, 4, 4\), not \[1, 2, 4, 4, 4\]"):
        model(torch.randn(1, 2, 4, 4, 4), torch.zeros(1))


def test_masks_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    share = {kind: torch.stack([MASKS.draw(kind, generator) for _ in range(20)]).mean((2, 3)) for kind in KINDS}
    assert torch.equal(share["predict"][0], (torch.arange(16) >= 8).float())
    assert torch.equal(share["backward"][0], (torch.arange(16) < 8).float())
    assert torch.equal((share["interpolation"][0] == 0).nonzero()[:, 0], torch.tensor([0, 4, 8, 12]))
    assert share["unconditional"].min() == 1
    assert torch.equal((share["one_frame"] == 0).sum(1), torch.ones(20, dtype=torch.long))
    assert 0.7 < share["random_frames"].mean() < 0.9
    inner = share["spatial"][:, 3:13]  # every frame that no draw leaves out
    assert torch.equal(inner, inner[:, :1].expand_as(inner))
    assert inner.min() > 0
    assert inner.max() <= 0.5
    assert all(set(MASKS.draw_for_training(generator).unique().tolist()) <= {0.0, 1.0} for _ in range(20))


def test_published_slice_masks_nothing_where_it_reaches_the_last_frame() -> None:
    published = VideoMasks(frames=16, height=8, width=8, published_slice=True)
    pairs = []
    for seed in range(20):
        draws = [m.draw("spatial", torch.Generator().manual_seed(seed)) for m in (MASKS, published)]
        pairs.append((bool(draws[0][-1].any()), bool(draws[1].any())))
    assert set(pairs) == {(True, False), (False, True)}


def test_block_mask_fills_its_share_nearly() -> None:
    shares = [block_mask(16, 16, 0.5, torch.Generator().manual_seed(seed)).mean().item() for seed in range(5)]
    assert all(0.4 < share <= 0.5 for share in shares)


def test_respacing() -> None:
    assert respaced_steps(1000, "5") == [0, 250, 500, 749, 999]
    assert respaced_steps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert respaced_steps(10, "2,3") == [0, 4, 5, 7, 9]
    assert respaced_steps(4, "") == [0, 1, 2, 3]
    betas = GaussianDiffusion(DiffusionConfig(noise_schedule="squaredcos_cap_v2")).betas
    assert math.isclose(float(betas[-1]), 0.999)
    for wrong in ("many", "0", "1001", "ddim999"):
        with pytest.raises(TersorError):
            respaced_steps(1000, wrong)
