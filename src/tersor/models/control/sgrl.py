"""SET, the subequivariant transformer of 3D-SGRL: one policy for bodies of any limbs (Chen et al., ICML 2023,
2305.18951).

What it is for: control in three dimensions. One actor moves hoppers, walkers and humanoids, and what it has learned
facing one way it knows facing any: turning the world about gravity changes no torque.

    actor = tersor.models.create("sgrl_actor")
    out = actor(src, limb_places(parents), limb_relation(parents))     # tersor.models.control.morphology; (L, B, 41) -> (L, B, 3)
    torques = actor.act(src, ...)                                      # max_action tanh(out)

src [L, B, 41] (limbs first) holds eight vectors of each limb (position relative to the torso, gravity, target
direction, velocity, angular velocity, joint axes x, y, z), then 17 scalars; a critic's (output_size=1) also the limb's
3 actions. A limb is Z [3, m], m vectors, and h [m], scalars; d = (gravity, target), two vectors; C = 32:

    Inv(Z)  V = [Z W; d] [3, C];  M = V^T V;  s = |M|_F + 1;  feature = W2 relu(W1 vec M)            invariant, as s is
    layer   u = [Inv(Z); h];  q, k, v = linear(u) / s;  a = softmax(q k^T + relation in the first layer)
            Z1 = a [Z W_v; d] W_g;  Z <- Z + Z1;  h <- LN(h + W_n a v)
            u = [Inv(Z1); h];  Z <- Z + [Z1 W; d] mat(MLP(u) / s) W5;  h <- LN(h + MLP(u) / s)
    actor   w = [Inv([raw; Z]); MLP([raw; h])];  force = [[raw; Z] W; d] mat(MLP(w) / s) w_d;  torque_k = force . axis_k
    critic  W w / s

h starts with embeddings of the limb's places in three traversals of the body's tree. The keys' d is attended to as
well.

Origin: alpc91/SGRL at 14ab19c, MIT; key names are the published ones, self_attn.in_proj and out_proj included, which
nothing uses. Quirks: two heads, whatever is asked for (others are refused here); dropout is always off; the layer takes
Inv of the message Z1, not of Z.

Proven: the golden cases of the published code (actor at two sizes, critic, traversals and relation), parameter counts, torques
unchanged under rotation and reflection of all vectors, Z rotating along, and changed torques when gravity and target stay.
Learned on a body that faces one way, it acts as well on bodies that face any way, where an MLP fails
(benchmarks/results/morphology.md). Not proven: any return. Missing: TD3 and the environments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of
from tersor.models.registry import register

_VECTORS, _C, _HEADS, _PLACES = 8, 32, 2, 15


@dataclass(frozen=True, kw_only=True)
class SGRLConfig:
    feature_size: int = 41  # of a limb: 24 numbers of vectors, then scalars
    output_size: int = 3  # 3: an actor's torques; 1: a critic's value
    ninp: int = 128  # m
    nhead: int = 2
    nhid: int = 256
    nlayers: int = 3
    condition_decoder: int = 1  # 0: without the raw state beside the encoded one
    transformer_norm: int = 1  # 0: without LayerNorm after the layers
    num_positions: int = 3  # traversals
    rel_size: int = 3
    max_action: float = 1.0

    def __post_init__(self) -> None:
        one_of("sgrl", "output_size", self.output_size, (1, 3))
        one_of("sgrl", "nhead", self.nhead, (_HEADS,))
        at_least("sgrl", 3 * _VECTORS + 1, feature_size=self.feature_size)
        at_least("sgrl", 1, nlayers=self.nlayers, nhid=self.nhid, num_positions=self.num_positions)
        at_least("sgrl", max(4, self.num_positions), ninp=self.ninp)


def with_directions(Z: Tensor, d: Tensor) -> Tensor:
    """[..., 3, n] and gravity and target [..., 3, 2] -> [..., 3, n + 2]."""
    return torch.cat((Z, d), -1)


def invariants(V: Tensor) -> tuple[Tensor, Tensor]:
    """V [..., 3, C] -> V^T V as [..., C C], and its Frobenius norm + 1 [..., 1]."""
    M = (V.mT @ V).flatten(-2)
    return M, M.norm(dim=-1, keepdim=True) + 1


class Attention(nn.Module):
    """Z [L, B, 3, m], h [L, B, m], d [L, B, 3, 2], bias [heads, L, L] or None -> messages of the same shapes."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * m, m)), nn.Parameter(torch.zeros(3 * m))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(m, m)  # these three are not used, as published
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(2 * m, 2 * m) for _ in range(3))
        self.vg_proj = nn.Linear(m, 2 * m - 2 * _HEADS, bias=False)
        self.ng_out, self.g_out = nn.Linear(2 * m, m), nn.Linear(2 * m, m, bias=False)
        self.g_proj = nn.Linear(m, _C - 2, bias=False)
        self.linear_g1, self.linear_g2 = nn.Linear(_C * _C, 2 * m), nn.Linear(2 * m, m)

    def forward(self, Z: Tensor, h: Tensor, d: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        M, s = invariants(with_directions(self.g_proj(Z), d))
        u = torch.cat((self.linear_g2(self.linear_g1(M).relu()), h), -1)  # [L, B, 2m]
        q, k, v = (
            rearrange(linear(u) / s, "l b (h c) -> b h l c", h=_HEADS)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = q @ k.mT * q.shape[-1] ** -0.5
        a = (logits if bias is None else logits + bias).softmax(-1)  # [B, heads, L, L]
        scalars = self.ng_out(rearrange(a @ v, "b h l c -> l b (h c)"))
        heads = rearrange(self.vg_proj(Z), "l b x (h c) -> b h l x c", h=_HEADS)
        directions = rearrange(d, "l b x c -> b 1 l x c").expand(-1, _HEADS, -1, -1, -1)
        vectors = torch.einsum("bhij,bhjxc->bhixc", a, with_directions(heads, directions))
        return self.g_out(rearrange(vectors, "b h l x c -> l b x (h c)")), scalars


class Layer(nn.Module):
    def __init__(self, config: SGRLConfig) -> None:
        super().__init__()
        m, hidden = config.ninp, config.nhid
        self.self_attn = Attention(m)
        self.linear1, self.linear2 = nn.Linear(2 * m, hidden), nn.Linear(hidden, m)
        self.norm1, self.norm2 = nn.LayerNorm(m), nn.LayerNorm(m)
        self.g_proj2, self.g_proj3 = (nn.Linear(m, _C - 2, bias=False) for _ in range(2))
        self.linear_g1, self.linear_g2 = nn.Linear(_C * _C, hidden), nn.Linear(hidden, m)
        self.linear3, self.linear4 = nn.Linear(2 * m, hidden), nn.Linear(hidden, _C * _C)
        self.linear5 = nn.Linear(_C, m, bias=False)

    def forward(self, Z: Tensor, h: Tensor, d: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        Z1, message = self.self_attn(Z, h, d, bias)
        h = self.norm1(h + message)
        M, s = invariants(with_directions(self.g_proj2(Z1), d))
        u = torch.cat((self.linear_g2(self.linear_g1(M).relu()), h), -1)
        mixed = with_directions(self.g_proj3(Z1), d) @ _matrix(self.linear4(self.linear3(u).relu()) / s)
        return Z + Z1 + self.linear5(mixed), self.norm2(h + self.linear2(self.linear1(u).relu()) / s)


class Encoder(nn.Module):
    def __init__(self, config: SGRLConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.nlayers))
        self.norm = nn.LayerNorm(config.ninp) if config.transformer_norm else None
        self.rel_encoder = nn.Linear(config.rel_size, _HEADS)

    def forward(self, Z: Tensor, h: Tensor, d: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        bias: Tensor | None = self.rel_encoder(relation).permute(2, 0, 1)  # [heads, query, key]
        for layer in self.layers:
            Z, h = layer(Z, h, d, bias)
            bias = None
        return Z, (h if self.norm is None else self.norm(h))


class Places(nn.Module):
    """traversals [n, L] -> [L, m]: an embedding of each limb's place in each."""

    def __init__(self, config: SGRLConfig) -> None:
        super().__init__()
        count, part = config.num_positions, config.ninp // config.num_positions
        widths = [part] * (count - 1) + [config.ninp - part * (count - 1)]
        self.embeddings = nn.ModuleList(nn.Embedding(_PLACES, width) for width in widths)

    def forward(self, traversals: Tensor) -> Tensor:
        return torch.cat([embed(row) for embed, row in zip(self.embeddings, traversals, strict=True)], -1)


@register(
    "sgrl",
    task="act",
    input="states",
    paper="arXiv 2305.18951",
    variants={
        "sgrl_actor": (4_712_712, {}),
        "sgrl_critic": (4_380_665, {"feature_size": 44, "output_size": 1}),
    },
    small={"ninp": 12, "nhid": 16, "nlayers": 2},
)
class SGRL(nn.Module):
    """src [L, B, feature_size], traversals [n, L], relation [L, L, 3] -> [L, B, output_size]."""

    def __init__(self, config: SGRLConfig) -> None:
        super().__init__()
        self.config = config
        m, scalars = config.ninp, config.feature_size - 3 * _VECTORS
        vectors_out, scalars_out = (m + _VECTORS, m + scalars) if config.condition_decoder else (m, m)
        self.pos_encoder = Places(config)
        self.transformer_encoder = Encoder(config)
        self.g_encoder, self.encoder = nn.Linear(_VECTORS, m, bias=False), nn.Linear(scalars, m)
        for linear in (self.g_encoder, self.encoder):
            nn.init.uniform_(linear.weight, -0.1, 0.1)
        nn.init.zeros_(self.encoder.bias)
        self.gg_proj = nn.Linear(vectors_out, _C - 2, bias=False)
        self.linear1_g, self.linear2_g = nn.Linear(_C * _C, m), nn.Linear(m, m)
        self.linear1_ng, self.linear2_ng = nn.Linear(scalars_out, m), nn.Linear(m, m)
        if config.output_size == 1:
            self.decoder_ng = nn.Linear(2 * m, 1)
        else:
            self.decoder_g = nn.Linear(_C, 1, bias=False)
            self.linear1_m, self.linear2_m = nn.Linear(2 * m, 2 * m), nn.Linear(2 * m, _C * _C)
            self.g_proj = nn.Linear(vectors_out, _C - 2, bias=False)

    def forward(self, src: Tensor, traversals: Tensor, relation: Tensor) -> Tensor:
        Z, h = self.encode(src, traversals, relation)
        vectors, scalars, d = self._parts(src)
        if self.config.condition_decoder:
            Z, h = torch.cat((vectors, Z), -1), torch.cat((scalars, h), -1)
        M, s = invariants(with_directions(self.gg_proj(Z), d))
        a = self.linear2_g(self.linear1_g(M).relu())
        w = torch.cat((a, self.linear2_ng(self.linear1_ng(h).relu())), -1)  # [L, B, 2m]
        if self.config.output_size == 1:
            return self.decoder_ng(w) / s
        mixed = with_directions(self.g_proj(Z), d) @ _matrix(self.linear2_m(self.linear1_m(w).relu()) / s)
        force = self.decoder_g(mixed)  # [L, B, 3, 1]
        return (force * vectors[..., 5:]).sum(-2)  # along each joint's axes

    def encode(self, src: Tensor, traversals: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors [L, B, 3, m] and scalars [L, B, m] of the limbs after all layers."""
        if src.shape[-1] != self.config.feature_size:
            raise TersorError(f"sgrl's limbs have {self.config.feature_size} features, src has {src.shape[-1]}")
        vectors, scalars, d = self._parts(src)
        scale = self.config.ninp**0.5
        h = self.encoder(scalars) * scale + self.pos_encoder(traversals)[:, None]
        return self.transformer_encoder(self.g_encoder(vectors) * scale, h, d, relation)

    def act(self, src: Tensor, traversals: Tensor, relation: Tensor) -> Tensor:
        if self.config.output_size == 1:
            raise TersorError("sgrl's critic does not act: output_size is 1, an actor's is 3")
        return self.config.max_action * F.tanh(self(src, traversals, relation))

    def _parts(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [L, B, 3, 8], scalars, and gravity and target [L, B, 3, 2]."""
        vectors = src[..., : 3 * _VECTORS].reshape(*src.shape[:-1], _VECTORS, 3).mT
        return vectors, src[..., 3 * _VECTORS :], vectors[..., 1:3]

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        """A chain of five limbs, facing x."""
        config, limbs = self.config, torch.arange(5)
        src = torch.randn(len(limbs), batch_size, config.feature_size)
        src[..., 3:9] = torch.tensor([0, 0, -9.81, 1, 0, 0])
        there, back = limbs.expand(config.num_positions, -1), limbs.flip(0)
        apart = (limbs[:, None] - limbs).abs()[..., None]
        return {
            "src": src,
            "traversals": torch.where(torch.arange(config.num_positions)[:, None] == 0, there, back),
            "relation": (apart / len(limbs)).expand(-1, -1, config.rel_size),
        }

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a file with actor and critics, this network's part; of the two critics the first."""
        prefix = "critic1." if self.config.output_size == 1 else "actor."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return own or state


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], _C, _C)
