"""Rectified flow: straight paths from noise to data (Liu et al., arXiv 2209.03003), as TripoSG and Stable Diffusion 3 train it.

    flow = RectifiedFlow(FlowConfig())
    loss = flow.loss(model, x0, context)                        # draws times and noise
    x0 = flow.sample(model, torch.randn(1, 2048, 64), context, steps=50, guidance=7.0)

With noise level s in (0, 1] and time t = 1000 s, which is what the model is shown:

    x_s = (1 - s) x0 + s noise
    model(x_s, t, context) = x0 - noise                         TripoSG's sign: from noise to data
    x_next = x + (s - s_next) * model(x, t, context)            s from 1 down to 0

n steps start at s_i = 1 - i/n, shifted to `shift` s / (1 + (shift - 1) s), or, where a `mu` is given, to
e^mu / (e^mu + 1/s - 1); a last 0 follows. Guidance w other than 1 gives v = v_0 + w (v_c - v_0), where v_0 is the velocity for a
context of zeros; both go through the model in one batch, that of zeros first.

Densities of the training times (Esser et al., arXiv 2403.03206): "uniform"; "logit_normal", s = sigmoid(N(mean, std));
"mode", s = 1 - u - scale (cos^2(pi u / 2) - 1 + u). Weights of the squared error: "none"; "sigma_sqrt", s^-2;
"cosmap", 2 / (pi (1 - 2 s + 2 s^2)).

Origin: VAST-AI-Research/TripoSG at fc5c409 (MIT), written from the formulas. Proven: its scheduler's case (times, levels,
the chain of eight steps, noising). Not proven: the published training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of
from tersor.progress import Progress

# (x (B, N, C), t (B,), context (B, L, D) or None) -> velocity (B, N, C)
Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
DENSITIES = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    num_train_timesteps: int = 1000  # the time at noise level 1
    shift: float = 1.0  # above 1: more of the steps at high noise
    use_dynamic_shifting: bool = False  # shift by the `mu` of each call instead
    density: str = "logit_normal"  # of the training times
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"  # of the loss

    def __post_init__(self) -> None:
        at_least("rectified flow", 1, num_train_timesteps=self.num_train_timesteps)
        one_of("rectified flow", "density", self.density, DENSITIES)
        one_of("rectified flow", "weighting", self.weighting, WEIGHTINGS)
        if not self.shift > 0:
            raise TersorError(f"rectified flow's shift is positive, not {self.shift}")


class RectifiedFlow:
    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def sigmas(self, steps: int, *, mu: float | None = None) -> Tensor:
        """(steps + 1,) float32 noise levels, from the first down to 0. Raises TersorError where `mu` is missing or of no use."""
        at_least("rectified flow", 1, steps=steps)
        if (mu is not None) != self.config.use_dynamic_shifting:
            raise TersorError(f"rectified flow takes mu with use_dynamic_shifting and only then, not mu={mu}")
        s = 1 - torch.arange(steps, dtype=torch.float64) / steps
        if mu is not None:
            s = math.exp(mu) / (math.exp(mu) + 1 / s - 1)
        else:
            s = self.config.shift * s / (1 + (self.config.shift - 1) * s)
        return torch.cat((s, s.new_zeros(1))).float()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma * self.config.num_train_timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_s at the times t (B,), or () for all samples."""
        s = (t / self.config.num_train_timesteps).to(x0).reshape(-1, *[1] * (x0.dim() - 1))
        return (1 - s) * x0 + s * noise

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        start: Tensor,
        context: Tensor | None = None,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        mu: float | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """start: noise, shaped as the result. guidance other than 1 needs a context. progress(what, done, total)."""
        if guidance != 1 and context is None:
            raise TersorError(
                f"guidance {guidance} leads towards a context, and there is none; give one, or guidance 1"
            )
        x, levels = start, self.sigmas(steps, mu=mu)
        for index in range(steps):
            t = self.time(levels[index]).to(x).expand(len(x))
            x = x + (levels[index] - levels[index + 1]).to(x) * self._velocity(model, x, t, context, guidance)
            if progress is not None:
                progress("steps", index + 1, steps)
        return x

    def _velocity(self, model: Model, x: Tensor, t: Tensor, context: Tensor | None, guidance: float) -> Tensor:
        if context is None or guidance == 1:
            return model(x, t, context)
        both = torch.cat((torch.zeros_like(context), context))
        without, towards = model(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        return without + guidance * (towards - without)

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) float32 noise levels by the density."""
        config = self.config
        if config.density == "logit_normal":
            z = torch.randn(count, generator=generator)
            return (config.logit_mean + config.logit_std * z).sigmoid()
        u = torch.rand(count, generator=generator)
        if config.density == "mode":
            return 1 - u - config.mode_scale * ((math.pi * u / 2).cos().square() - 1 + u)
        return u

    def weight(self, sigma: Tensor) -> Tensor:
        if self.config.weighting == "sigma_sqrt":
            return sigma**-2
        if self.config.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        return torch.ones_like(sigma)

    def loss(
        self,
        model: Model,
        x0: Tensor,
        context: Tensor | None = None,
        *,
        drop_context: float = 0.0,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Scalar: the weighted mean of (v - (x0 - noise))^2.

        drop_context: the share of samples whose context is replaced by zeros, so that guidance works. sigma (B,) and
        noise, as x0: instead of drawn ones.
        """
        s = self.draw_times(len(x0)).to(x0.device) if sigma is None else sigma
        noise = torch.randn_like(x0) if noise is None else noise
        if context is not None and drop_context > 0:
            kept = torch.rand(len(x0), device=x0.device) >= drop_context
            context = context * kept.to(context).reshape(-1, *[1] * (context.dim() - 1))
        t = self.time(s)
        errors = (model(self.add_noise(x0, noise, t), t, context) - (x0 - noise)).square()
        return (self.weight(s) * errors.flatten(1).mean(1)).mean()
