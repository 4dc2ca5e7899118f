"""Gaussian diffusion with learned variances, and with a mask of given positions (DDPM, improved DDPM, DDIM, VDT).

    diffusion = GaussianDiffusion(DiffusionConfig())
    loss = diffusion.losses(model, x0, t, mask=mask).loss.mean()                        # t (B,) drawn from range(steps)
    fast = GaussianDiffusion(DiffusionConfig(timestep_respacing="50"))
    x = fast.sample(model, torch.randn(shape), given=x0, mask=mask, sampler="ddim")

Samples are (B, T, C, H, W) for videos or (B, C, H, W) for images; model(x, t) returns eps, and with `learn_sigma` twice the
channels: eps, then v. With a = cumulative product of (1 - beta):

    x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps
    log sigma_t^2 = (v + 1)/2 log beta_t + (1 - v)/2 log(posterior variance)
    loss = mean (m (eps - eps_hat))^2 + vb            vb: KL to the posterior in bits; at t = 0 the decoder's likelihood

mask m (B, T, H, W): 1 = generate, 0 = given. Given positions enter the model clean, in training and at each sampling step.
The mean runs over all positions, given ones too, and m does not enter vb, both as VDT publishes it. The sampler returns
given positions as the chain left them; `paste_given` puts the given values there.

Respacing "50" keeps 50 evenly spaced steps, ends included; "10,20" keeps 10 and 20 of two equal parts; "ddim50" takes
every k-th step with k such that 50 remain. The model is shown the original step numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of

Model = Callable[[Tensor, Tensor], Tensor]
SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    timestep_respacing: str = ""  # "": all steps
    noise_schedule: str = "linear"  # or "squaredcos_cap_v2"
    diffusion_steps: int = 1000
    learn_sigma: bool = True
    sigma_small: bool = False  # without learn_sigma: the posterior's variance instead of beta
    predict_xstart: bool = False  # the model returns x0, not eps; turn learn_sigma off, its loss outgrows it
    use_kl: bool = False  # loss = vb alone, summed over all steps
    rescale_learned_sigmas: bool = False  # vb of all steps over 1000, as improved DDPM's hybrid loss

    def __post_init__(self) -> None:
        at_least("diffusion", 1, diffusion_steps=self.diffusion_steps)
        one_of("diffusion", "noise_schedule", self.noise_schedule, ("linear", "squaredcos_cap_v2"))


@dataclass(frozen=True)
class DiffusionLosses:
    """Each (B,); `mse` or `vb` is zero where the config has no such term."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


@dataclass(frozen=True)
class Step:
    """What the model says about x_{t-1}."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        alphas = (1 - beta_schedule(config.noise_schedule, config.diffusion_steps)).cumprod(0)
        self.timestep_map = torch.tensor(respaced_steps(config.diffusion_steps, config.timestep_respacing))
        a = alphas[self.timestep_map]  # (steps,), float64
        a_before = torch.cat((a.new_ones(1), a[:-1]))
        betas = 1 - a / a_before
        self.steps, self.betas, self.a, self.a_before = len(a), betas, a, a_before
        variance = betas * (1 - a_before) / (1 - a)  # of the posterior; 0 at the first step
        self.posterior_log_variance = torch.cat((variance[1:2], variance[1:])).log() if len(a) > 1 else betas.log()
        self.large_log_variance = torch.cat((variance[1:2], betas[1:])).log() if len(a) > 1 else betas.log()
        self.mean_of_x0 = betas * a_before.sqrt() / (1 - a)
        self.mean_of_x = (1 - a_before) * (1 - betas).sqrt() / (1 - a)

    def to(self, device: str | torch.device) -> GaussianDiffusion:
        """With the tables on the device, so that no step waits for a copy of them. Returns itself."""
        for name, table in vars(self).items():
            if isinstance(table, Tensor):
                setattr(self, name, table.to(device))
        return self

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return _at(self.a.sqrt(), t, x0) * x0 + _at((1 - self.a).sqrt(), t, x0) * noise

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return _at(self.mean_of_x0, t, x) * x0 + _at(self.mean_of_x, t, x) * x

    def call(self, model: Model, x: Tensor, t: Tensor) -> Tensor:
        return model(x, self.timestep_map.to(t.device)[t])

    def step(self, output: Tensor, x: Tensor, t: Tensor, *, clip: bool = False) -> Step:
        """The model's output for x at step t -> mean and variance of the next x."""
        if self.config.learn_sigma:
            output, v = output.chunk(2, -3)
            low, high = _at(self.posterior_log_variance, t, x), _at(self.betas.log(), t, x)
            share = (v + 1) / 2
            log_variance = share * high + (1 - share) * low
        else:
            table = self.posterior_log_variance if self.config.sigma_small else self.large_log_variance
            log_variance = _at(table, t, x).expand_as(x)
        if self.config.predict_xstart:
            x0 = output
        else:
            x0 = _at(self.a.rsqrt(), t, x) * x - _at((1 / self.a - 1).sqrt(), t, x) * output
        if clip:
            x0 = x0.clamp(-1, 1)
        return Step(self.posterior_mean(x0, x, t), log_variance, x0)

    def losses(
        self, model: Model, x0: Tensor, t: Tensor, *, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> DiffusionLosses:
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.add_noise(x0, t, noise)
        m = _channels(mask, x0)
        output = self.call(model, x0 * (1 - m) + x * m, t)
        zero = x0.new_zeros(len(x0))
        if self.config.use_kl:
            vb = self.variational_bound(output, x0, x, t) * self.steps
            return DiffusionLosses(vb, zero, vb)
        estimate, vb = output, zero
        if self.config.learn_sigma:
            estimate, v = output.chunk(2, -3)
            vb = self.variational_bound(torch.cat((estimate.detach(), v), -3), x0, x, t)  # trains the variance only
            if self.config.rescale_learned_sigmas:
                vb = vb * self.steps / 1000
        target = x0 if self.config.predict_xstart else noise
        mse = ((target - estimate) * m).square().flatten(1).mean(1)
        return DiffusionLosses(mse + vb, mse, vb)

    def variational_bound(self, output: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(B,), bits a dimension."""
        step = self.step(output, x, t)
        mean, log_variance = self.posterior_mean(x0, x, t), _at(self.posterior_log_variance, t, x)
        ratio = log_variance - step.log_variance
        kl = 0.5 * (ratio.exp() - 1 - ratio + (mean - step.mean).square() * (-step.log_variance).exp())
        nll = -discretized_log_likelihood(x0, step.mean, 0.5 * step.log_variance)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        start: Tensor,
        *,
        given: Tensor | None = None,
        mask: Tensor | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,  # DDIM: 0 is deterministic, 1 as random as DDPM
        clip: bool = False,  # x0 to [-1, 1]: for pixels, not for latents
        paste_given: bool = False,
        noise: Iterator[Tensor] | None = None,  # one tensor a step, instead of fresh noise
    ) -> Tensor:
        """start: noise, shaped as the result."""
        one_of("diffusion", "sampler", sampler, SAMPLERS)
        if (given is None) != (mask is None):
            raise TersorError("diffusion's given and mask go together: values, and where they are (0 in the mask)")
        x, m, known = start, _channels(mask, start), torch.zeros_like(start) if given is None else given
        for index in reversed(range(self.steps)):
            t = torch.full((len(x),), index, device=x.device)
            output = self.call(model, known * (1 - m) + x * m, t)
            step = self.step(output, x, t, clip=clip)  # of x as the chain has it, given positions too
            drawn = torch.randn_like(x) if noise is None else next(noise)
            x = self._ddim(step, x, t, drawn, eta) if sampler == "ddim" else self._ddpm(step, t, drawn)
        return known * (1 - m) + x * m if paste_given else x

    def _ddpm(self, step: Step, t: Tensor, noise: Tensor) -> Tensor:
        return (
            step.mean
            + _at(self.timestep_map > self.timestep_map[0], t, noise) * (0.5 * step.log_variance).exp() * noise
        )

    def _ddim(self, step: Step, x: Tensor, t: Tensor, noise: Tensor, eta: float) -> Tensor:
        a, before = _at(self.a, t, x), _at(self.a_before, t, x)
        eps = (x - a.sqrt() * step.x0) * (1 - a).rsqrt()  # again from x0, which may have been clipped
        sigma = eta * ((1 - before) / (1 - a)).sqrt() * (1 - a / before).clamp(min=0).sqrt()  # 0 at the last step
        return before.sqrt() * step.x0 + (1 - before - sigma.square()).clamp(min=0).sqrt() * eps + sigma * noise


def beta_schedule(name: str, steps: int) -> Tensor:
    """(steps,), float64. Linear: 1e-4 to 0.02 for 1000 steps, scaled for others."""
    if name == "linear":
        scale = 1000 / steps
        return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    alphas = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alphas[1:] / alphas[:-1]).clamp(max=0.999)


def respaced_steps(steps: int, respacing: str) -> list[int]:
    """The original steps that are kept, ascending."""
    try:
        if respacing.startswith("ddim"):
            wanted = int(respacing.removeprefix("ddim"))
            for stride in range(1, steps):
                if len(range(0, steps, stride)) == wanted:
                    return list(range(0, steps, stride))
            raise TersorError(
                f"no whole stride through {steps} steps leaves {wanted}; timestep_respacing='{wanted}' does"
            )
        counts = [int(count) for count in respacing.split(",")] if respacing else [steps]
    except ValueError:
        raise TersorError(f"timestep_respacing is like '50', '10,20' or 'ddim50', not {respacing!r}") from None
    kept, start = [], 0
    for part, count in enumerate(counts):
        size = steps // len(counts) + (part < steps % len(counts))
        if not 1 <= count <= size:
            raise TersorError(f"timestep_respacing {respacing!r} wants {count} of {size} steps; 1 to {size} works")
        apart = (size - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(apart * index) for index in range(count)]
        start += size
    return kept


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of x in [-1, 1] rounded to 256 levels under a Gaussian, whose distribution function is the tanh approximation."""

    def below(edge: float) -> Tensor:
        z = (x - mean + edge) * (-log_scale).exp()
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())

    upper, lower = below(1 / 255), below(-1 / 255)
    middle = (upper - lower).clamp(min=1e-12).log()
    high = (1 - lower).clamp(min=1e-12).log()  # the outermost levels reach to infinity
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), torch.where(x > 0.999, high, middle))


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The table's entries of each sample, in like's type, shaped to multiply it."""
    return table.to(like.device)[t].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _channels(mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return x.new_ones(())
    if mask.shape != x.shape[:-3] + x.shape[-2:]:
        wanted = [*x.shape[:-3], *x.shape[-2:]]
        raise TersorError(f"the mask of samples {list(x.shape)} is {wanted}, not {list(mask.shape)}")
    return mask.unsqueeze(-3)
