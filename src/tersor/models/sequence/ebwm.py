"""EBWM, an energy-based world model: it predicts by going downhill (Gladstone et al., 2024, arXiv 2406.08862).

What it is for: predicting the next frame's features by optimisation. A transformer gives every pair of a past and a
candidate for what comes next an energy; the prediction is found by gradient descent on the candidate. More steps are
more thought, and the energy says how sure the model is.

    model = tersor.models.create("ebwm_xxs")
    guesses, energies = model.think(frames, steps=4)                   # frames (B, S, D) -> lists of (B, S, D), (B, S, 1)
    loss = model.training_loss(frames)["loss"]                         # of S - 1 frames and those after each
    energy = model(frames, guesses[-1])                                # (B, S, 1): of what follows each frame

    h = x + A(RMSNorm x);   x = h + W2 (SiLU(W1 n) W3 n), n = RMSNorm h            hidden D; no biases
    energy = w RMSNorm(x_candidates)
    one step:  p <- p - alpha dE/dp,   E the sum of all energies;   alpha learns

Frames o_1..o_S and candidates p_2..p_{S+1} go through the same weights in two streams. Frames attend causally to frames;
candidate p_{t+1} to o_1..o_t and to itself, so S predictions are made at once and none sees another. Rotary in pairs
(2i, 2i + 1): frame t stands at t - 1, its candidate at t. With ebt_type "time_embed" a learned token for the step
number comes before the frames, and all positions are one later; "adaln" and "adaln_zero" modulate the blocks with it
(shift, scale and gate of each half), the latter from zero; steps beyond mcmc_num_steps count as the last.

Each training step ends in SmoothL1 to the true next frames, whose mean is the loss; its gradient goes through dE/dp
(second order), and through earlier guesses only with no_mcmc_detach. Train alpha with its own rate, published 3 alpha.

Origin: alexiglad/EBT at 0ad3628 (EBTDefault, EBT_VID), Apache-2.0. Its key names are ours, less `model.`; the frozen
image encoder in a checkpoint is dropped, frames are features already. Its default of ebt_type for this paper is
"default". Its random step sizes and step counts are not here, neither is its form for text.

Proven: the golden cases of the published code (energies, guesses, second-order gradients, with and without step token),
energies equal to causal runs of each candidate alone, gradients against finite differences. Not proven: the published
scaling; adaln, for which there is no case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.positions import rotary_table, rotate
from tersor.models.key_maps import drop, rename
from tersor.models.registry import register

_LEAST_ALPHA = 1e-4


@dataclass(frozen=True, kw_only=True)
class EBWMConfig:
    embedding_dim: int = 768  # D
    num_transformer_blocks: int = 12
    multiheaded_attention_heads: int = 12
    ffn_dim_multiplier: float | None = None  # of the hidden width; None: 1
    ebt_type: str = "default"  # "time_embed", "adaln", "adaln_zero"
    context_length: int = 16  # frames while training; no effect
    mcmc_num_steps: int = 2  # of descent while training
    mcmc_step_size: float = 30_000.0  # alpha at first
    mcmc_step_size_learnable: bool = True
    langevin_dynamics_noise: float = 0.0  # standard deviation of what is added to a guess before its energy
    langevin_dynamics_noise_learnable: bool = False
    denoising_initial_condition: str = "random_noise"  # "zeros", "most_recent_embedding"
    no_mcmc_detach: bool = False  # gradients through all steps
    truncate_mcmc: bool = False  # loss of the last step alone
    clamp_futures_grad: bool = False  # no guess moves by more than the next in a step
    clamp_futures_grad_max_change: float = 9.0

    def __post_init__(self) -> None:
        at_least("ebwm", 1, num_transformer_blocks=self.num_transformer_blocks, mcmc_num_steps=self.mcmc_num_steps)
        divides(
            "ebwm", "multiheaded_attention_heads", self.multiheaded_attention_heads, "embedding_dim", self.embedding_dim
        )
        one_of("ebwm", "ebt_type", self.ebt_type, ("default", "time_embed", "adaln", "adaln_zero"))
        starts = ("random_noise", "zeros", "most_recent_embedding")
        one_of("ebwm", "denoising_initial_condition", self.denoising_initial_condition, starts)
        if self.embedding_dim // self.multiheaded_attention_heads % 2:
            raise TersorError(f"ebwm turns pairs of channels, but embedding_dim {self.embedding_dim} gives odd heads")


class Attention(nn.Module):
    """Two streams x (B, S, D) and p (B, C, D), C candidates for what follows the last C of x."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(d, d, bias=False)
        self.wk = nn.Linear(d, d, bias=False)
        self.wv = nn.Linear(d, d, bias=False)
        self.wo = nn.Linear(d, d, bias=False)

    def forward(self, n: Tensor, frames: int) -> Tensor:
        """n (B, frames + candidates, D); explicit products, for they are differentiated twice."""
        q, k, v = (rearrange(w(n), "b l (h d) -> b h l d", h=self.heads) for w in (self.wq, self.wk, self.wv))
        candidates = n.shape[1] - frames
        ahead = frames - candidates  # of frames that have no candidate: the step's token
        cos, sin = (part.to(n) for part in rotary_table(frames + 1, q.shape[-1]))
        place = torch.cat((torch.arange(frames), torch.arange(ahead + 1, frames + 1))).to(n.device)
        q, k = (rotate(each, cos[place], sin[place], interleaved=True) for each in (q, k))
        scale = q.shape[-1] ** -0.5
        scores = q @ k[:, :, :frames].mT * scale  # (B, h, frames + candidates, frames)
        last_seen = torch.cat((torch.arange(frames), torch.arange(ahead, frames))).to(n.device)
        hidden = torch.arange(frames, device=n.device) > last_seen[:, None]
        own = (q * k).sum(-1, keepdim=True) * scale
        own = torch.cat((torch.full_like(own[:, :, :frames], float("-inf")), own[:, :, frames:]), 2)
        weights = torch.cat((scores.masked_fill(hidden, float("-inf")), own), -1).softmax(-1)
        y = weights[..., :-1] @ v[:, :, :frames] + weights[..., -1:] * v
        return self.wo(rearrange(y, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.w3 = nn.Linear(d, hidden, bias=False)

    def forward(self, n: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(n)) * self.w3(n))


def _modulation(d: int, parts: int, *, zero: bool) -> nn.Sequential:
    layer = nn.Linear(d, parts * d)
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)


class Block(nn.Module):
    def __init__(self, config: EBWMConfig) -> None:
        super().__init__()
        d = config.embedding_dim
        self.attention = Attention(d, config.multiheaded_attention_heads)
        self.feed_forward = FeedForward(d, int(d * (config.ffn_dim_multiplier or 1)))
        self.attention_norm = nn.RMSNorm(d, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(d, eps=1e-5)
        self.adaLN_modulation: nn.Module | None = None
        if config.ebt_type.startswith("adaln"):
            self.adaLN_modulation = _modulation(d, 6, zero=config.ebt_type == "adaln_zero")

    def forward(self, x: Tensor, frames: int, step: Tensor | None) -> Tensor:
        if self.adaLN_modulation is None:
            h = x + self.attention(self.attention_norm(x), frames)
            return h + self.feed_forward(self.ffn_norm(h))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(step).chunk(6, -1)
        h = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, frames)
        return h + gate2 * self.feed_forward(self.ffn_norm(h) * (1 + scale2) + shift2)


class ModulatedEnergy(nn.Module):
    """The last layer of adaln: (B, C, D) -> (B, C, 1)."""

    def __init__(self, d: int, *, zero: bool) -> None:
        super().__init__()
        self.adaLN_modulation = _modulation(d, 2, zero=zero)
        self.linear = nn.Linear(d, 1, bias=False)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(step).chunk(2, -1)
        return self.linear(x * (1 + scale) + shift)


class Transformer(nn.Module):
    def __init__(self, config: EBWMConfig) -> None:
        super().__init__()
        d, self.kind = config.embedding_dim, config.ebt_type
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_transformer_blocks))
        self.norm = nn.RMSNorm(d, eps=1e-5)
        modulated = self.kind.startswith("adaln")
        zero = self.kind == "adaln_zero"
        self.final_layer = ModulatedEnergy(d, zero=zero) if modulated else nn.Linear(d, 1, bias=False)
        if self.kind != "default":
            self.time_embeddings = nn.Embedding(config.mcmc_num_steps, d)

    def forward(self, frames: Tensor, guesses: Tensor, step: int) -> Tensor:
        known = None
        if self.kind != "default":
            known = self.time_embeddings.weight[min(step, self.time_embeddings.num_embeddings - 1)]
        if self.kind == "time_embed":
            assert known is not None
            frames = torch.cat((known.expand(len(frames), 1, -1), frames), 1)
        x = torch.cat((frames, guesses), 1)
        for layer in self.layers:
            x = layer(x, frames.shape[1], known)
        x = self.norm(x)[:, frames.shape[1] :]
        return self.final_layer(x, known) if self.kind.startswith("adaln") else self.final_layer(x)


@register(
    "ebwm",
    task="encode",
    input="sequence",
    paper="arXiv 2406.08862",
    variants={
        "ebwm_4xs": (
            230_146,
            {"num_transformer_blocks": 2, "multiheaded_attention_heads": 2, "embedding_dim": 128},
        ),
        "ebwm_3xs": (
            1_837_570,
            {"num_transformer_blocks": 4, "multiheaded_attention_heads": 4, "embedding_dim": 256},
        ),
        "ebwm_xxs": (
            6_198_530,
            {"num_transformer_blocks": 6, "multiheaded_attention_heads": 6, "embedding_dim": 384},
        ),
        "ebwm_xs": (
            12_396_290,
            {"num_transformer_blocks": 12, "multiheaded_attention_heads": 6, "embedding_dim": 384},
        ),
        "ebwm_small": (49_565_186, {}),
        "ebwm_medium": (
            176_211_970,
            {"num_transformer_blocks": 24, "multiheaded_attention_heads": 16, "embedding_dim": 1024},
        ),
        "ebwm_large": (
            396_438_530,
            {"num_transformer_blocks": 24, "multiheaded_attention_heads": 16, "embedding_dim": 1536},
        ),
        "ebwm_xl": (
            704_745_474,
            {"num_transformer_blocks": 24, "multiheaded_attention_heads": 32, "embedding_dim": 2048},
        ),
    },
    small={
        "embedding_dim": 32,
        "num_transformer_blocks": 2,
        "multiheaded_attention_heads": 2,
        "ebt_type": "time_embed",
        "mcmc_step_size": 30.0,
    },
)
class EBWM(nn.Module):
    """frames and guesses of what follows each (B, S, D) -> energies (B, S, 1)."""

    def __init__(self, config: EBWMConfig) -> None:
        super().__init__()
        self.config = config
        self.alpha = nn.Parameter(torch.tensor(config.mcmc_step_size), requires_grad=config.mcmc_step_size_learnable)
        self.langevin_dynamics_noise_std = nn.Parameter(
            torch.tensor(config.langevin_dynamics_noise), requires_grad=config.langevin_dynamics_noise_learnable
        )
        self.transformer = Transformer(config)
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and "adaLN" not in name:
                nn.init.xavier_normal_(module.weight)

    def forward(self, frames: Tensor, guesses: Tensor, step: int = 0) -> Tensor:
        """step: how many steps of descent the guesses have behind them; the default ebt_type does not ask."""
        if frames.shape != guesses.shape:
            raise TersorError(
                f"ebwm needs a guess a frame: frames are {list(frames.shape)}, guesses {list(guesses.shape)}"
            )
        return self.transformer(frames, guesses, step)

    def first_guess(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.config.denoising_initial_condition == "zeros":
            return torch.zeros_like(frames)
        if self.config.denoising_initial_condition == "most_recent_embedding":
            return frames.clone()
        return torch.randn(frames.shape, generator=generator, dtype=frames.dtype).to(frames.device)

    def think(
        self,
        frames: Tensor,
        guesses: Tensor | None = None,
        *,
        steps: int | None = None,
        learn: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The guesses (B, S, D) after each step of descent, and the energies (B, S, 1) before it.

        guesses: where to begin. steps: as while training where not given. learn: keep the graph for training.
        """
        config = self.config
        guesses = self.first_guess(frames, generator) if guesses is None else guesses
        alpha = self.alpha.clamp(min=_LEAST_ALPHA)
        made, energies = [], []
        with torch.enable_grad():
            for step in range(config.mcmc_num_steps if steps is None else steps):
                if not (learn and config.no_mcmc_detach and step):
                    guesses = guesses.detach().requires_grad_()
                if config.langevin_dynamics_noise or config.langevin_dynamics_noise_learnable:
                    noise = torch.randn(guesses.shape, generator=generator, dtype=guesses.dtype).to(guesses.device)
                    guesses = guesses + noise * self.langevin_dynamics_noise_std
                energy = self(frames, guesses, step)
                (gradient,) = torch.autograd.grad(energy.sum(), guesses, create_graph=learn)
                if config.clamp_futures_grad:
                    most = config.clamp_futures_grad_max_change / float(alpha.detach())
                    gradient = gradient.clamp(-most, most)
                guesses = guesses - alpha * gradient
                if not learn:
                    guesses, energy = guesses.detach(), energy.detach()
                made.append(guesses)
                energies.append(energy)
        return made, energies

    def training_loss(
        self, frames: Tensor, guesses: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """frames (B, S + 1, D); the last S are predicted. guesses (B, S, D): where to begin."""
        made, _ = self.think(frames[:, :-1], guesses, learn=True, generator=generator)
        losses = [F.smooth_l1_loss(guess, frames[:, 1:]) for guess in made]
        counted = losses[-1:] if self.config.truncate_mcmc else losses
        return {"loss": torch.stack(counted).mean(), "final_step_loss": losses[-1]}

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        shape = (batch_size, 6, self.config.embedding_dim)
        return {"frames": torch.randn(shape), "guesses": torch.randn(shape)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return drop(rename(state, (r"^model\.", "")), r"^image_encoder\.")
