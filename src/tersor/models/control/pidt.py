"""PIDT, a physics-informed Decision Transformer that restores a feeder's service (Zhao et al., 2024, arXiv 2407.00808).

What it is for: choosing actions by the return that is asked for, learned from recorded trajectories. PIDT chooses the
next switch of a distribution feeder (tersor.data.restoration), where physics decides which switches may be closed.

    model = tersor.models.create("pidt", state_dim=33, act_dim=9, discrete=True)
    states, actions, returns = model(**data)                   # data: tersor.data.restoration.trajectories(...)
    probabilities = model.act(states, actions, returns_to_go, timesteps, feasible=feasible)        # of the newest step

The backbone is the Decision Transformer (Chen et al., NeurIPS 2021, arXiv 2106.01345). K steps are the tokens (R_1,
s_1, a_1, ..., R_K, s_K, a_K), R the return still to come; each is embedded linearly, plus an embedding of its time
step, then LayerNorm, and GPT-2 blocks without positions:

    x + W attention(LN x);  x + MLP(LN x);  causal, padded steps masked;  LN at the end

The state's token predicts the action, the action's token the next state and return. Continuous actions: tanh, squared
error. discrete=True, PIDT: softmax over the switches that `feasible` [B, K, A] allows (others get exactly 0), cross
entropy.

Origin: no code of PIDT is public. The backbone is kzl/decision-transformer at e2d82e6 (gym), MIT, whose checkpoints
load, as do those of transformers' DecisionTransformerModel; `wte` is in them, and used by nothing. n_positions has no
effect there. Ours for PIDT: the feasibility mask within the softmax and the loss, the size (that of the gym variant),
the environment.

Proven: the golden cases of the published backbone, its parameter count, left padding, causality, zero probability of
what is not feasible, (tersor.data.restoration) that no violated limit is let through, also by another AC power flow, and on a
feeder of 8 cells that a PIDT trained on random runs restores the optimum when asked for it. Not proven: any result of the paper.
Feeders of 13 and 123 nodes: tersor.data.feeders; what it restores there: benchmarks/results/service_restoration.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, divides
from tersor.models.key_maps import State, drop, rename
from tersor.models.registry import register

_MASKED = -1e4  # published: a padded step attends to something, though nobody looks at it


@dataclass(frozen=True, kw_only=True)
class PIDTConfig:
    state_dim: int = 17
    act_dim: int = 6  # discrete: how many switches
    discrete: bool = False
    max_length: int = 20  # K
    max_ep_len: int = 1000  # time steps that have an embedding
    hidden_size: int = 128
    n_layer: int = 3
    n_head: int = 1
    n_inner: int = 0  # 0: 4 hidden_size
    activation_function: str = "relu"
    action_tanh: bool = True  # continuous actions
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1

    def __post_init__(self) -> None:
        divides("pidt", "n_head", self.n_head, "hidden_size", self.hidden_size)
        activation(self.activation_function, of="pidt")
        at_least(
            "pidt", 1, state_dim=self.state_dim, act_dim=self.act_dim, max_length=self.max_length, n_layer=self.n_layer
        )


class Predictions(NamedTuple):
    states: Tensor  # [B, K, S], of the next step
    actions: Tensor  # [B, K, A]; discrete: logits
    returns: Tensor  # [B, K, 1], of the next step


class Attention(nn.Module):
    def __init__(self, config: PIDTConfig) -> None:
        super().__init__()
        h, self.heads = config.hidden_size, config.n_head
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.attn_pdrop, self.dropout = config.attn_pdrop, nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.attn_pdrop if self.training else 0.0)
        return self.dropout(self.out(rearrange(y, "b h n d -> b n (h d)")))


class MLP(nn.Module):
    def __init__(self, config: PIDTConfig) -> None:
        super().__init__()
        h, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
        self.up, self.down = nn.Linear(h, inner), nn.Linear(inner, h)
        self.act = activation(config.activation_function, of="pidt")
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.act(self.up(x))))


class Block(nn.Module):
    def __init__(self, config: PIDTConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """x [B, 3K, h], mask [B, 1, 3K, 3K] added to the logits -> [B, 3K, h]."""

    def __init__(self, config: PIDTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(1, config.hidden_size)  # not used, as published
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(x)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)


@register(
    "pidt",
    task="act",
    input="states",
    paper="arXiv 2407.00808",
    variants={"pidt_dt_gym": (730_008, {})},
    small={"state_dim": 5, "act_dim": 2, "max_length": 6, "max_ep_len": 50, "hidden_size": 16, "n_layer": 2},
)
class PIDT(nn.Module):
    """states [B, K, S], actions [B, K, A], returns_to_go [B, K, 1], timesteps [B, K] -> predictions.

    attention_mask [B, K]: 0 at padded steps. feasible [B, K, A]: which switches each step allows.
    """

    def __init__(self, config: PIDTConfig) -> None:
        super().__init__()
        self.config = config
        h, s, a = config.hidden_size, config.state_dim, config.act_dim
        self.transformer = GPT2(config)
        self.embed_timestep = nn.Embedding(config.max_ep_len, h)
        self.embed_return, self.embed_state, self.embed_action = nn.Linear(1, h), nn.Linear(s, h), nn.Linear(a, h)
        self.embed_ln = nn.LayerNorm(h)
        self.predict_state, self.predict_return = nn.Linear(h, s), nn.Linear(h, 1)
        bounded = config.action_tanh and not config.discrete
        self.predict_action = nn.Sequential(nn.Linear(h, a), *([nn.Tanh()] if bounded else []))

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        attention_mask: Tensor | None = None,
        feasible: Tensor | None = None,
    ) -> Predictions:
        time = self.embed_timestep(timesteps)  # [B, K, h]
        tokens = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        x = torch.stack([token + time for token in tokens], 2).flatten(1, 2)  # [B, 3K, h]
        x = self.transformer(self.embed_ln(x), self._mask(x, attention_mask))
        _, of_state, of_action = x.unflatten(1, (-1, 3)).unbind(2)
        predicted = self.predict_action(of_state)
        if feasible is not None:
            predicted = self._only(predicted, feasible)
        return Predictions(self.predict_state(of_action), predicted, self.predict_return(of_action))

    def loss(self, predicted: Predictions, actions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Of the actions at steps that are not padded; one-hot rows where they are discrete."""
        given, wanted = predicted.actions, actions
        if attention_mask is not None:
            given, wanted = given[attention_mask > 0], wanted[attention_mask > 0]
        if self.config.discrete:
            return F.cross_entropy(given.flatten(0, -2), wanted.flatten(0, -2).argmax(-1))
        return F.mse_loss(given, wanted)

    @torch.no_grad()
    def act(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        feasible: Tensor | None = None,
    ) -> Tensor:
        """A run so far, [t, ·] each, the newest action zeros -> the action [A], or the probability of every switch [A].

        Only the last K steps count. feasible [A]: of the newest step.
        """
        K = self.config.max_length
        kept = min(len(states), K)

        def padded(x: Tensor) -> Tensor:
            return torch.cat((x.new_zeros(K - kept, *x.shape[1:]), x[len(x) - kept :]))[None]

        mask = padded(torch.ones(kept, device=states.device))
        time = padded(timesteps.clamp(max=self.config.max_ep_len - 1))
        last = self(padded(states), padded(actions), padded(returns_to_go), time, mask).actions[0, -1]
        if not self.config.discrete:
            return last
        if feasible is not None:
            if not feasible.any():
                raise TersorError("pidt cannot act: no switch is feasible")
            last = self._only(last, feasible)
        return last.softmax(-1)

    def _only(self, logits: Tensor, feasible: Tensor) -> Tensor:
        if not self.config.discrete:
            raise TersorError("pidt takes feasible=... only where actions are switches: discrete=True")
        if feasible.shape != logits.shape:
            raise TersorError(f"pidt's feasible is {list(feasible.shape)}, its logits {list(logits.shape)}")
        return logits.masked_fill(~feasible, -torch.inf)

    def _mask(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Added to the logits of attention, [B or 1, 1, 3K, 3K]."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mask = x.new_zeros(x.shape[1], x.shape[1]).masked_fill(later, _MASKED)[None, None]
        if attention_mask is None:
            return mask
        return mask + (1 - attention_mask.to(x.dtype)).repeat_interleave(3, 1)[:, None, None] * _MASKED

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config, K = self.config, self.config.max_length
        return {
            "states": torch.randn(batch_size, K, config.state_dim),
            "actions": torch.randn(batch_size, K, config.act_dim),
            "returns_to_go": torch.rand(batch_size, K, 1),
            "timesteps": torch.arange(K).expand(batch_size, K) % config.max_ep_len,
        }

    def convert_checkpoint(self, state: State) -> State:
        """GPT-2's Conv1D weights are [in, out]; transformers calls the backbone encoder and keeps positions."""
        state = drop(state, r"\.attn\.(bias|masked_bias)$", r"\.wpe\.weight$")
        turned = {
            key: value.t() if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
            for key, value in state.items()
        }
        return rename(
            turned,
            (r"^encoder\.", "transformer."),
            (r"\.attn\.c_attn\.", ".attn.qkv."),
            (r"\.attn\.c_proj\.", ".attn.out."),
            (r"\.mlp\.c_fc\.", ".mlp.up."),
            (r"\.mlp\.c_proj\.", ".mlp.down."),
        )
