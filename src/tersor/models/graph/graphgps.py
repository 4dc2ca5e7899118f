"""GraphGPS, a general, powerful, scalable graph transformer (Rampášek et al., NeurIPS 2022, arXiv 2205.12454).

What it is for: predictions about graphs (molecules, peptides, superpixels) and their nodes. Every layer passes messages
along edges and attends between all nodes of a graph, side by side; encodings say where in the graph a node is.

    model = tersor.models.load("graphgps_zinc", "checkpoint.ckpt")         # needs tersor[graphs]
    rwse = random_walk_encoding(edge_index, nodes, range(1, 21))           # tersor.data.graph_encodings
    y = model(x, edge_index, edge_attr, batch, pestat_RWSE=rwse)           # (graphs, dim_out)

A batch is flat, as in torch_geometric: nodes x [N, ·], edges edge_index [2, E] (from row 0 to row 1) with edge_attr
[E, ·], batch [N] the graph of each node, ascending. A layer, h [N, d] and e [E, d]:

    h_M = Norm(h + MPNN(h, e)),   h_T = Norm(h + Attention(h within each graph))
    h   = h_M + h_T;   h = Norm(h + W2 act(W1 h))            W1: d -> 2d

The global part DSVN has DeepSets in attention's place (deepsets.py). Norm is BatchNorm over the nodes of the whole
batch, or LayerNorm over all nodes and channels of a graph. A node encoder "TypeDictNode+RWSE" concatenates an embedding
of width d - p and the encodings of width p. Every encoding's statistics come as a keyword argument: pestat_RWSE,
pestat_HKdiagSE, pestat_ElstaticSE; EigVals and EigVecs (LapPE); eigvals_sn and eigvecs_sn (SignNet).

Origin: rampasek/GraphGPS at 2801570, MIT; key names are ours but for attention's packed in_proj_weight, which is a
Linear here, and the "model." before all of them in training checkpoints. Quirks: GatedGCN has its residual, norm and
dropout inside, so the layer adds none before its norm; the edges that it returns are those of before the sigmoid.
GINE's eps is a buffer of the checkpoint. Performer has heads of 64 whatever d, and only blanks the values of padded
nodes: results depend on how much padding a batch has. Molecule checkpoints know 4 or 5 kinds of chirality; we have 5,
and a missing one is zero; our parameter counts of those variants are therefore d - p above the published ones.

Proven: the golden cases of the published code (GatedGCN, GINE, PNA, both norms, Transformer, Performer; the whole ZINC
and Peptides models with RWSE, LapPE and SignNet, gradients included), published parameter counts.
Not proven: any published accuracy; BigBird, inductive_edge heads and EquivStableLapPE encodings are absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, GENConv, GINConv, LayerNorm, PNAConv
from torch_geometric.nn import global_add_pool as add_pool
from torch_geometric.nn import global_max_pool as max_pool
from torch_geometric.nn import global_mean_pool as mean_pool
from torch_geometric.utils import to_dense_batch

from tersor.errors import TersorError
from tersor.models.graph.deepsets import DeepSets, DeepSetsConfig
from tersor.models.graph.encoders import (
    ACTIVATIONS,
    ATOM_TYPES,
    BOND_TYPES,
    ENCODINGS,
    AtomEncoder,
    BondEncoder,
    EncodingConfig,
    LapPE,
    LinearEncoder,
    SignNet,
    StatisticsEncoder,
    TypeEncoder,
    one_of,
    sum_at,
)
from tersor.models.registry import register

LOCAL = ("CustomGatedGCN", "GINE", "GIN", "GCN", "GENConv", "GAT", "PNA", "None")
GLOBAL = ("Transformer", "BiasedTransformer", "Performer", "DSVN", "None")
_POOLS = {"add": add_pool, "mean": mean_pool, "max": max_pool}


@dataclass(frozen=True, kw_only=True)
class GPSLayerConfig:
    dim_h: int = 64
    local_gnn_type: str = "GINE"
    global_model_type: str = "Transformer"
    num_heads: int = 4
    act: str = "relu"
    dropout: float = 0.0
    attn_dropout: float = 0.0
    layer_norm: bool = False
    batch_norm: bool = True
    pna_degrees: tuple[int, ...] = ()  # how many nodes of the training set have 0, 1, 2, ... neighbours
    equivstable_pe: bool = False
    dsvn: DeepSetsConfig = field(default_factory=DeepSetsConfig)

    def __post_init__(self) -> None:
        one_of("local_gnn_type", self.local_gnn_type, LOCAL)
        one_of("global_model_type", self.global_model_type, GLOBAL)
        one_of("act", self.act, ACTIVATIONS)
        if self.layer_norm and self.batch_norm:
            raise TersorError("graphgps has layer_norm or batch_norm, not both")
        if self.dim_h % self.num_heads and self.global_model_type not in ("Performer", "DSVN"):
            raise TersorError(f"graphgps' {self.num_heads} heads do not divide the width {self.dim_h}")
        if self.equivstable_pe and self.local_gnn_type not in ("CustomGatedGCN", "GINE"):
            raise TersorError(f"graphgps' equivstable_pe is for CustomGatedGCN and GINE, not {self.local_gnn_type}")
        if self.local_gnn_type == "PNA" and not self.pna_degrees:
            raise TersorError("graphgps' PNA needs pna_degrees, the histogram of degrees in the training set")


@dataclass(frozen=True, kw_only=True)
class GraphGPSConfig:
    node_encoder: str = "TypeDictNode+RWSE"  # TypeDictNode, Atom or LinearNode, and encodings joined by +
    edge_encoder: str = "TypeDictEdge"  # or Bond, LinearEdge
    node_types: int = 28  # TypeDictNode
    edge_types: int = 4  # TypeDictEdge
    dim_in: int = 1  # width of raw features: LinearNode, an encoding alone
    dim_edge: int = 1  # LinearEdge
    posenc_RWSE: EncodingConfig | None = None  # noqa: N815
    posenc_HKdiagSE: EncodingConfig | None = None  # noqa: N815
    posenc_ElstaticSE: EncodingConfig | None = None  # noqa: N815
    posenc_LapPE: EncodingConfig | None = None  # noqa: N815
    posenc_SignNet: EncodingConfig | None = None  # noqa: N815
    layer_type: str = "GINE+Transformer"
    layers: int = 10
    dim_hidden: int = 64  # d
    n_heads: int = 4
    dropout: float = 0.0
    attn_dropout: float = 0.0
    layer_norm: bool = False
    batch_norm: bool = True
    act: str = "relu"
    pna_degrees: tuple[int, ...] = ()
    dsvn: DeepSetsConfig = field(default_factory=DeepSetsConfig)  # of the global part DSVN
    head: str = "san_graph"  # or "graph", "inductive_node"
    pooling: str = "add"  # or "mean", "max"
    layers_post_mp: int = 1  # of the heads other than san_graph
    batchnorm: bool = True  # in those
    dim_out: int = 1

    def __post_init__(self) -> None:
        parts = self.node_encoder.split("+")
        for name in parts if parts[0] in ENCODINGS else parts[1:]:
            one_of("node_encoder", name, ENCODINGS)
            if getattr(self, f"posenc_{name}") is None:
                raise TersorError(f"graphgps' node_encoder names {name}, but posenc_{name} is not given")
        one_of("node_encoder", parts[0], ("TypeDictNode", "Atom", "LinearNode", *ENCODINGS))
        one_of("edge_encoder", self.edge_encoder, ("TypeDictEdge", "Bond", "LinearEdge"))
        one_of("head", self.head, ("san_graph", "graph", "inductive_node"))
        one_of("pooling", self.pooling, _POOLS)
        if self.layer_type.count("+") != 1:
            raise TersorError(f"graphgps' layer_type is LOCAL+GLOBAL, as GINE+Transformer, not {self.layer_type!r}")
        self.layer()

    def layer(self) -> GPSLayerConfig:
        local, _, attention = self.layer_type.partition("+")
        return GPSLayerConfig(
            dim_h=self.dim_hidden,
            local_gnn_type=local,
            global_model_type=attention,
            num_heads=self.n_heads,
            act=self.act,
            dropout=self.dropout,
            attn_dropout=self.attn_dropout,
            layer_norm=self.layer_norm,
            batch_norm=self.batch_norm,
            pna_degrees=self.pna_degrees,
            dsvn=self.dsvn,
        )


# Message passing: (x [N, d], edge_index, edges [E, d], positions [N, k] or None) -> x


class Closeness(nn.Sequential):
    """r_ij = MLP(|p_i - p_j|^2) in (0, 1), [E, 1]."""

    def __init__(self, d: int, act: str) -> None:
        super().__init__(nn.Linear(1, d), ACTIVATIONS[act](), nn.Linear(d, 1), nn.Sigmoid())

    def of(self, positions: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        return self((positions[target] - positions[source]).square().sum(-1, keepdim=True))


class GatedGCN(nn.Module):
    """Also returns the edges: e_ij = D x_i + E x_j + C e_ij gates the messages B x_j."""

    def __init__(self, config: GPSLayerConfig, *, residual: bool = True) -> None:
        super().__init__()
        d, self.residual = config.dim_h, residual
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(d, d) for _ in range(5))
        self.bn_node_x, self.bn_edge_e = nn.BatchNorm1d(d), nn.BatchNorm1d(d)
        self.act_fn_x, self.act_fn_e = ACTIVATIONS[config.act](), ACTIVATIONS[config.act]()
        self.dropout = nn.Dropout(config.dropout)
        if config.equivstable_pe:
            self.mlp_r_ij = Closeness(d, config.act)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        source, target = edge_index
        e = self.D(x)[target] + self.E(x)[source] + self.C(edges)
        gate = e.sigmoid()
        if positions is not None:
            gate = gate * self.mlp_r_ij.of(positions, edge_index)
        gated = sum_at(target, gate * self.B(x)[source], len(x))
        y = self.A(x) + gated / (sum_at(target, gate, len(x)) + 1e-6)
        y = self.dropout(self.act_fn_x(self.bn_node_x(y)))
        e = self.dropout(self.act_fn_e(self.bn_edge_e(e)))
        return (x + y, edges + e) if self.residual else (y, e)


class GINE(nn.Module):
    """nn((1 + eps) x_i + sum_j relu(x_j + e_ij))."""

    eps: Tensor

    def __init__(self, config: GPSLayerConfig) -> None:
        super().__init__()
        self.nn = _two_layers(config)
        self.register_buffer("eps", torch.zeros(1))
        if config.equivstable_pe:
            self.mlp_r_ij = Closeness(config.dim_h, config.act)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor, positions: Tensor | None) -> Tensor:
        source, target = edge_index
        message = (x[source] + edges).relu()
        if positions is not None:
            message = message * self.mlp_r_ij.of(positions, edge_index)
        return self.nn((1 + self.eps) * x + sum_at(target, message, len(x)))


def make_local(config: GPSLayerConfig) -> nn.Module | None:
    d = config.dim_h
    match config.local_gnn_type:
        case "CustomGatedGCN":
            return GatedGCN(config)
        case "GINE":
            return GINE(config)
        case "GIN":
            return GINConv(_two_layers(config))
        case "GCN":
            return GCNConv(d, d)
        case "GENConv":
            return GENConv(d, d)
        case "GAT":
            return GATConv(d, d // config.num_heads, heads=config.num_heads, edge_dim=d)
        case "PNA":
            degrees = torch.tensor(config.pna_degrees, device="cpu")
            return PNAConv(d, d, ["mean", "max", "sum"], ["identity"], deg=degrees, edge_dim=min(128, d))
        case _:
            return None


# Attention within each graph: (x [G, n, d] padded, real [G, n], bias [G heads, n, n] or None) -> [G, n, d]


class Attention(nn.Module):
    def __init__(self, config: GPSLayerConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.attn_dropout
        self.in_proj = nn.Linear(config.dim_h, 3 * config.dim_h)
        self.out_proj = nn.Linear(config.dim_h, config.dim_h)

    def forward(self, x: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.in_proj(x), "g n (three h d) -> three g h n d", three=3, h=self.heads)
        mask = real[:, None, None]
        if bias is not None:
            mask = rearrange(bias, "(g h) q k -> g h q k", h=self.heads).masked_fill(~mask, -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(rearrange(y, "g h n d -> g n (h d)"))


class FastAttention(nn.Module):
    """softmax(q k^T) v by positive random features: phi(q) (phi(k)^T v), O(n)."""

    projection_matrix: Tensor

    def __init__(self, head_size: int) -> None:
        super().__init__()
        features = int(head_size * math.log(head_size))
        self.register_buffer("projection_matrix", _orthogonal_rows(features, head_size))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self._features(q, over=(-1,)), self._features(k, over=(-1, -2))
        return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])

    def _features(self, x: Tensor, *, over: tuple[int, ...]) -> Tensor:
        """[..., n, head size] -> [..., n, features] but for a factor that cancels; `over`: what the maximum is of."""
        x = x * x.shape[-1] ** -0.25
        logits = x @ self.projection_matrix.mT
        largest = logits.amax(over, keepdim=True).detach()
        return torch.exp(logits - x.square().sum(-1, keepdim=True) / 2 - largest) + 1e-4


class Performer(nn.Module):
    head_size = 64

    def __init__(self, config: GPSLayerConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        d, inner = config.dim_h, self.heads * self.head_size
        self.fast_attention = FastAttention(self.head_size)
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, d)
        self.dropout = nn.Dropout(config.attn_dropout)

    def forward(self, x: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(linear(x), "g n (h d) -> g h n d", h=self.heads) for linear in (self.to_q, self.to_k, self.to_v)
        )
        y = self.fast_attention(q, k, v * real[:, None, :, None])
        return self.dropout(self.to_out(rearrange(y, "g h n d -> g n (h d)")))


class GPSLayer(nn.Module):
    """x [N, d], edges [E, d] -> both of the same shape. positions [N, k] with equivstable_pe; attn_bias [G heads, n, n]
    of a BiasedTransformer, n the nodes of the largest graph."""

    def __init__(self, config: GPSLayerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dim_h
        self.local_model = make_local(config)
        self.self_attn: nn.Module | None = None
        if config.global_model_type == "None":
            pass
        elif config.global_model_type == "DSVN":
            self.self_attn = DeepSets(d, config.dsvn)
        else:
            self.self_attn = (Performer if config.global_model_type == "Performer" else Attention)(config)
        self.norm1_local = _norm(config) if self.local_model is not None else None
        self.norm1_attn = _norm(config) if self.self_attn is not None else None
        self.ff_linear1, self.ff_linear2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.act = ACTIVATIONS[config.act]()
        self.norm2 = _norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor,
        batch: Tensor,
        positions: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        branches = []
        if self.local_model is not None:
            y, edge_attr = self._pass_messages(x, edge_index, edge_attr, positions)
            branches.append(_normalized(self.norm1_local, y, batch))
        if self.self_attn is not None:
            padded, real = to_dense_batch(x, batch)
            y = x + self.dropout(self.self_attn(padded, real, attn_bias)[real])
            branches.append(_normalized(self.norm1_attn, y, batch))
        x = sum(branches[1:], branches[0]) if branches else torch.zeros_like(x)
        y = self.ff_linear2(self.dropout(self.act(self.ff_linear1(x))))
        return _normalized(self.norm2, x + self.dropout(y), batch), edge_attr

    def _pass_messages(
        self, x: Tensor, edge_index: Tensor, edges: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The local branch before its norm, and the edges."""
        assert self.local_model is not None
        if self.config.local_gnn_type == "CustomGatedGCN":
            return self.local_model(x, edge_index, edges, positions)
        if self.config.local_gnn_type == "GINE":
            y = self.local_model(x, edge_index, edges, positions)
        elif self.config.local_gnn_type in ("GIN", "GCN"):
            y = self.local_model(x, edge_index)
        else:
            y = self.local_model(x, edge_index, edges)
        return x + self.dropout(y), edges

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return _layers_renamed(state)


class NodeEncoder(nn.Module):
    """encoder1 embeds the raw features in d - p channels, encoder2 and so on append p of encodings."""

    def __init__(self, config: GraphGPSConfig, kind: str, encodings: list[str]) -> None:
        super().__init__()
        p = sum(_encoding(config, name).dim_pe for name in encodings)
        self.encoder1 = _raw_encoder(config, kind, config.dim_hidden - p)
        for i, name in enumerate(encodings):
            setattr(self, f"encoder{i + 2}", _make_encoding(config, name))
        self.names = [f"encoder{i + 2}" for i in range(len(encodings))]

    def forward(self, x: Tensor, statistics: dict[str, Tensor], edge_index: Tensor, batch: Tensor) -> Tensor:
        encodings = [getattr(self, name)(statistics, edge_index, batch) for name in self.names]
        return torch.cat((self.encoder1(x), *encodings), -1)


class EncodingAlone(nn.Module):
    """A linear map of raw numbers beside one encoding, which this class wraps without a name of its own in the keys."""

    def __init__(self, config: GraphGPSConfig, name: str) -> None:
        super().__init__()
        self.linear_x = nn.Linear(config.dim_in, config.dim_hidden - _encoding(config, name).dim_pe)
        self.encoding = _make_encoding(config, name)

    def forward(self, x: Tensor, statistics: dict[str, Tensor], edge_index: Tensor, batch: Tensor) -> Tensor:
        return torch.cat((self.linear_x(x.float()), self.encoding(statistics, edge_index, batch)), -1)


class FeatureEncoder(nn.Module):
    def __init__(self, config: GraphGPSConfig) -> None:
        super().__init__()
        kind, *encodings = config.node_encoder.split("+")
        if kind in ENCODINGS:
            self.node_encoder: nn.Module = EncodingAlone(config, kind)
        elif encodings:
            self.node_encoder = NodeEncoder(config, kind, encodings)
        else:
            self.node_encoder = _raw_encoder(config, kind, config.dim_hidden)
        d, self.alone = config.dim_hidden, not encodings and kind not in ENCODINGS
        if config.edge_encoder == "Bond":
            self.edge_encoder: nn.Module = BondEncoder(d)
        elif config.edge_encoder == "LinearEdge":
            self.edge_encoder = LinearEncoder(config.dim_edge, d)
        else:
            self.edge_encoder = TypeEncoder(config.edge_types, d)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, statistics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        nodes = self.node_encoder(x) if self.alone else self.node_encoder(x, statistics, edge_index, batch)
        return nodes, self.edge_encoder(edge_attr)


# Heads: (x [N, d], batch) -> [graphs, dim_out], or [N, dim_out]


class SANHead(nn.Module):
    def __init__(self, config: GraphGPSConfig) -> None:
        super().__init__()
        d = config.dim_hidden
        self.pool, self.act = _POOLS[config.pooling], ACTIVATIONS[config.act]()
        widths = ((d, d // 2), (d // 2, d // 4), (d // 4, config.dim_out))
        self.FC_layers = nn.ModuleList(nn.Linear(a, b) for a, b in widths)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        x = self.pool(x, batch)
        for linear in list(self.FC_layers)[:-1]:
            x = self.act(linear(x))
        return self.FC_layers[-1](x)


class Named(nn.Module):
    """GraphGym's layers of a head, only for their names: a Linear called `model`, then norm and activation."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class MLPHead(nn.Module):
    def __init__(self, config: GraphGPSConfig) -> None:
        super().__init__()
        d = config.dim_hidden
        self.pool = None if config.head == "inductive_node" else _POOLS[config.pooling]
        hidden = {}
        for i in range(config.layers_post_mp - 1):
            linear = Named(model=nn.Linear(d, d, bias=not config.batchnorm))
            norm = [nn.BatchNorm1d(d)] if config.batchnorm else []
            post = nn.Sequential(*norm, ACTIVATIONS[config.act]())
            hidden[f"Layer_{i}"] = Named(layer=linear, post_layer=post)
        last = Named(model=nn.Linear(d, config.dim_out))
        self.layer_post_mp = Named(model=nn.Sequential(*([Named(**hidden)] if hidden else []), last))

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return self.layer_post_mp(x if self.pool is None else self.pool(x, batch))


@register(
    "graphgps",
    task="graph-predict",
    input="graph",
    paper="arXiv 2205.12454",
    variants={
        "graphgps_zinc": (
            423_717,
            {
                "attn_dropout": 0.5,
                "posenc_RWSE": {"dim_pe": 28, "statistics": 20, "raw_norm_type": "BatchNorm"},
            },
        ),
        "graphgps_zinc_signnet": (
            497_933,
            {
                "node_encoder": "TypeDictNode+SignNet",
                "attn_dropout": 0.5,
                "posenc_SignNet": {
                    "model": "DeepSet",
                    "dim_pe": 28,
                    "layers": 8,
                    "post_layers": 3,
                    "max_freqs": 37,
                    "phi_out_dim": 64,
                },
            },
        ),
        "graphgps_peptides_func": (
            504_442,
            {
                "node_encoder": "Atom+LapPE",
                "edge_encoder": "Bond",
                "posenc_LapPE": {"model": "DeepSet", "dim_pe": 16, "layers": 2, "max_freqs": 10},
                "layer_type": "CustomGatedGCN+Transformer",
                "layers": 4,
                "dim_hidden": 96,
                "attn_dropout": 0.5,
                "head": "graph",
                "pooling": "mean",
                "dim_out": 10,
            },
        ),
        "graphgps_peptides_struct": (
            504_539,
            {
                "node_encoder": "Atom+LapPE",
                "edge_encoder": "Bond",
                "posenc_LapPE": {"model": "DeepSet", "dim_pe": 16, "layers": 2, "max_freqs": 10},
                "layer_type": "CustomGatedGCN+Transformer",
                "layers": 4,
                "dim_hidden": 96,
                "attn_dropout": 0.5,
                "head": "graph",
                "pooling": "mean",
                "dim_out": 11,
            },
        ),
        "graphgps_pcqm4m_small": (
            6_152_285,
            {
                "node_encoder": "Atom+RWSE",
                "edge_encoder": "Bond",
                "posenc_RWSE": {"dim_pe": 20, "statistics": 16, "raw_norm_type": "BatchNorm"},
                "layer_type": "CustomGatedGCN+Transformer",
                "layers": 5,
                "dim_hidden": 304,
                "attn_dropout": 0.5,
                "pooling": "mean",
            },
        ),
        "graphgps_pcqm4m_medium": (
            19_415_005,
            {
                "node_encoder": "Atom+RWSE",
                "edge_encoder": "Bond",
                "posenc_RWSE": {"dim_pe": 20, "statistics": 16, "raw_norm_type": "BatchNorm"},
                "layer_type": "CustomGatedGCN+Transformer",
                "layers": 10,
                "dim_hidden": 384,
                "n_heads": 16,
                "dropout": 0.1,
                "attn_dropout": 0.1,
                "pooling": "mean",
            },
        ),
        "graphgps_pcqm4m_deep": (
            13_807_581,
            {
                "node_encoder": "Atom+RWSE",
                "edge_encoder": "Bond",
                "posenc_RWSE": {"dim_pe": 20, "statistics": 16, "raw_norm_type": "BatchNorm"},
                "layer_type": "CustomGatedGCN+Transformer",
                "layers": 16,
                "dim_hidden": 256,
                "n_heads": 8,
                "dropout": 0.1,
                "attn_dropout": 0.1,
                "act": "gelu",
                "pooling": "mean",
            },
        ),
        "graphgps_molhiv": (
            558_673,
            {
                "node_encoder": "Atom+RWSE",
                "edge_encoder": "Bond",
                "posenc_RWSE": {"dim_pe": 16, "statistics": 16, "raw_norm_type": "BatchNorm"},
                "layer_type": "CustomGatedGCN+Transformer",
                "attn_dropout": 0.5,
                "pooling": "mean",
            },
        ),
    },
    small={
        "dim_hidden": 16,
        "layers": 2,
        "posenc_RWSE": {"dim_pe": 4, "statistics": 6, "raw_norm_type": "BatchNorm"},
    },
    untraceable="graphs are padded to the largest of the batch, which is known only when it runs",
)
class GraphGPS(nn.Module):
    """x [N, ·], edge_index [2, E], edge_attr [E, ·], batch [N], statistics -> [graphs, dim_out], or [N, dim_out]."""

    def __init__(self, config: GraphGPSConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FeatureEncoder(config)
        self.layers = nn.ModuleList(GPSLayer(config.layer()) for _ in range(config.layers))
        self.post_mp = (SANHead if config.head == "san_graph" else MLPHead)(config)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, **statistics: Tensor) -> Tensor:
        x, edge_attr = self.encoder(x, edge_index, edge_attr, batch, statistics)
        for layer in self.layers:
            x, edge_attr = layer(x, edge_index, edge_attr, batch)
        return self.post_mp(x, batch)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return example_graphs(self.config, batch_size)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return _layers_renamed(encoder_keys(state, self.encoder))


def encoder_keys(state: dict[str, Tensor], encoder: FeatureEncoder) -> dict[str, Tensor]:
    """A checkpoint's keys without a training run's prefix, and with the encoder's as they are here."""
    if state and all(key.startswith("model.") for key in state):
        state = {key.removeprefix("model."): value for key, value in state.items()}
    alone = isinstance(encoder.node_encoder, EncodingAlone)
    converted = {}
    for key, value in state.items():
        place = "encoder.node_encoder."
        if alone and key.startswith(place) and not key.startswith((f"{place}linear_x", f"{place}encoding")):
            key = f"{place}encoding.{key.removeprefix(place)}"
        if key.endswith("atom_embedding_list.1.weight") and len(value) == ATOM_TYPES[1] - 1:
            value = F.pad(value, (0, 0, 0, 1))  # the older vocabulary has no fifth kind of chirality
        converted[key] = value
    return converted


def example_graphs(config: GraphGPSConfig, batch_size: int) -> dict[str, Tensor]:
    """Rings of 6, 7, 8, 6, ... nodes with random features and statistics."""
    sizes = [6 + i % 3 for i in range(batch_size)]
    batch = torch.repeat_interleave(torch.arange(batch_size), torch.tensor(sizes))
    first = torch.cat([torch.arange(n) for n in sizes])
    offset = torch.arange(len(batch)) - first
    there = torch.stack((offset + first, offset + (first + 1) % torch.tensor(sizes)[batch]))
    edge_index = torch.cat((there, there.flip(0)), 1)
    kind, nodes, edges = config.node_encoder.split("+")[0], len(batch), edge_index.shape[1]
    inputs = {
        "x": _example_features(nodes, kind, ATOM_TYPES, config.node_types, config.dim_in),
        "edge_index": edge_index,
        "edge_attr": _example_features(edges, config.edge_encoder, BOND_TYPES, config.edge_types, config.dim_edge),
        "batch": batch,
    }
    for name in ("RWSE", "HKdiagSE", "ElstaticSE"):
        if (encoding := getattr(config, f"posenc_{name}")) is not None:
            inputs[f"pestat_{name}"] = torch.rand(nodes, encoding.statistics)
    for name, values, vectors in (("LapPE", "EigVals", "EigVecs"), ("SignNet", "eigvals_sn", "eigvecs_sn")):
        if (encoding := getattr(config, f"posenc_{name}")) is not None:
            absent = torch.arange(encoding.max_freqs) >= torch.tensor(sizes)[batch][:, None]
            inputs[vectors] = torch.randn(absent.shape).masked_fill(absent, torch.nan)
            inputs[values] = torch.rand(absent.shape).masked_fill(absent, torch.nan)[..., None]
    return inputs


def _layers_renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention's packed projection is a Linear here; GAT's one W was written twice before torch_geometric 2.5."""
    renames = (("self_attn.in_proj_", "self_attn.in_proj."), ("local_model.lin_src.", "local_model.lin."))
    renamed = {}
    for key, value in state.items():
        if "local_model.lin_dst." in key:
            continue
        for published, ours in renames:
            key = key.replace(published, ours)
        renamed[key] = value
    return renamed


def _two_layers(config: GPSLayerConfig) -> nn.Sequential:
    d = config.dim_h
    return nn.Sequential(nn.Linear(d, d), ACTIVATIONS[config.act](), nn.Linear(d, d))


def _norm(config: GPSLayerConfig) -> nn.Module | None:
    if config.layer_norm:
        return LayerNorm(config.dim_h, mode="graph")
    return nn.BatchNorm1d(config.dim_h) if config.batch_norm else None


def _normalized(norm: nn.Module | None, x: Tensor, batch: Tensor) -> Tensor:
    if norm is None:
        return x
    return norm(x, batch) if isinstance(norm, LayerNorm) else norm(x)


def _orthogonal_rows(rows: int, columns: int) -> Tensor:
    """Random rows as long as normal ones, orthogonal to each other in groups of `columns`."""
    groups = [torch.linalg.qr(torch.randn(columns, columns))[0] for _ in range(-(-rows // columns))]
    return torch.cat(groups)[:rows] * torch.randn(rows, columns).norm(dim=1, keepdim=True)


def _encoding(config: GraphGPSConfig, name: str) -> EncodingConfig:
    found = getattr(config, f"posenc_{name}")
    assert isinstance(found, EncodingConfig)
    return found


def _make_encoding(config: GraphGPSConfig, name: str) -> nn.Module:
    encoding = _encoding(config, name)
    if name == "LapPE":
        return LapPE(encoding, config.act)
    return SignNet(encoding) if name == "SignNet" else StatisticsEncoder(name, encoding, config.act)


def _raw_encoder(config: GraphGPSConfig, kind: str, width: int) -> nn.Module:
    if kind == "Atom":
        return AtomEncoder(width)
    return TypeEncoder(config.node_types, width) if kind == "TypeDictNode" else LinearEncoder(config.dim_in, width)


def _example_features(count: int, kind: str, columns: Sequence[int], types: int, width: int) -> Tensor:
    if kind in ("Atom", "Bond"):
        return torch.stack([torch.randint(column, (count,)) for column in columns], 1)
    return torch.randint(types, (count,)) if kind.startswith("TypeDict") else torch.randn(count, width)
