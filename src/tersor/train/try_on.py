"""Training and sampling of virtual try-on by rectified flow (SD3, arXiv 2403.03206; TED-VITON, arXiv 2411.17017).

    prior = model.prior()                                                     # before training: the base, frozen
    loss = try_on_loss(model, latents, condition, **texts_and_garment).mean()
    loss = loss + text_preservation_loss(model, prior, text_latents, encoder_hidden_states, pooled_projections).mean()
    latents = sample(model, torch.randn(shape), condition, steps=30, **texts_and_garment)

latents x0 (B, C, H, W) are those of the dressed person, condition (B, 2 C + 1, H, W) is [mask, masked person, pose] with mask 1
where the garment belongs. With noise e and a share s in (0, 1), logit-normal:

    x = (1 - s) x0 + s e,   timestep = 1000 s          try-on loss: mean (v(x) - (e - x0))^2
    text preservation: mean (v(x) - v_prior(x))^2      without condition, garment and adapter, on pictures that contain text

Of the second the paper gives the idea and no formula; the caller weighs the two.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tersor.errors import TersorError

STEPS = 1000  # a timestep's unit


def noise_share(count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """(count,), logit-normal: sigmoid of a standard normal."""
    return torch.randn(count, generator=generator).sigmoid()


def noised(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    share = s.to(x0).reshape(-1, *[1] * (x0.dim() - 1))
    return (1 - share) * x0 + share * noise


def try_on_loss(
    model: nn.Module,
    latents: Tensor,
    condition: Tensor,
    *,
    noise: Tensor | None = None,
    s: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """(B,). inputs: the texts and the garment, as the model's forward names them."""
    noise, s = drawn(latents, noise, s)
    x = torch.cat((noised(latents, noise, s), condition), 1)
    v: Tensor = model(hidden_states=x, timestep=STEPS * s, **inputs)
    return (v - (noise - latents)).square().flatten(1).mean(1)


def text_preservation_loss(
    model: nn.Module,
    prior: nn.Module,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    *,
    noise: Tensor | None = None,
    s: Tensor | None = None,
) -> Tensor:
    """(B,): how far the try-on net, left alone, has moved from the prior. No gradient reaches the prior."""
    noise, s = drawn(latents, noise, s)
    x, text = noised(latents, noise, s), (encoder_hidden_states, pooled_projections)
    nothing = x.new_zeros(len(x), 2 * x.shape[1] + 1, *x.shape[2:])
    with torch.no_grad():
        wanted: Tensor = prior(x, *text, STEPS * s)
    v: Tensor = model(torch.cat((x, nothing), 1), *text, STEPS * s)
    return (v - wanted).square().flatten(1).mean(1)


@torch.no_grad()
def sample(
    model: nn.Module, noise: Tensor, condition: Tensor, *, steps: int = 30, shift: float = 3.0, **inputs: Tensor
) -> Tensor:
    """Latents (B, C, H, W) from noise of that shape, in Euler steps from s = 1 to 0. shift: steps are spent where
    s' = shift s / (1 + (shift - 1) s) lies evenly in s, SD3's 3 for its large pictures; 1: evenly."""
    if steps < 1 or shift <= 0:
        raise TersorError(f"sampling takes steps of at least 1 and a shift above 0, not {steps} and {shift}")
    s = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    s = shift * s / (1 + (shift - 1) * s)
    x = noise
    for now, after in itertools.pairwise(s):
        timestep = (STEPS * now).expand(len(x))
        x = x + (after - now) * model(hidden_states=torch.cat((x, condition), 1), timestep=timestep, **inputs)
    return x


def drawn(latents: Tensor, noise: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is not given is drawn with torch's random numbers."""
    noise = torch.randn_like(latents) if noise is None else noise
    return noise, (noise_share(len(latents)) if s is None else s).to(latents)
