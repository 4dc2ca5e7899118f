"""Encoders of graphs' nodes and edges: categories, molecules' features, positional and structural encodings.

What GraphGPS' models are fed through; every class is named and keyed as there. An encoding's forward takes the batch's
statistics by name (see tersor.data.graph_encodings), edge_index [2, E] and batch [N], and gives [N, dim_pe].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import TersorError

ENCODINGS = ("RWSE", "HKdiagSE", "ElstaticSE", "LapPE", "SignNet")
ATOM_TYPES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
BOND_TYPES = (5, 6, 2)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "lrelu_01": lambda: nn.LeakyReLU(0.1),
    "prelu": nn.PReLU,
    "swish": nn.SiLU,
    "identity": nn.Identity,
}


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """One positional or structural encoding; the published `posenc_*` section."""

    model: str = "Linear"  # RWSE and the like: Linear, MLP; LapPE: DeepSet, Transformer; SignNet: DeepSet, MLP
    dim_pe: int = 16  # p
    layers: int = 3
    n_heads: int = 4
    post_layers: int = 0
    raw_norm_type: str = "none"  # or BatchNorm
    statistics: int = 20  # RWSE, HKdiagSE: how many times; ElstaticSE: 10
    max_freqs: int = 10
    phi_hidden_dim: int = 64
    phi_out_dim: int = 4


class StatisticsEncoder(nn.Module):
    """RWSE, HKdiagSE, ElstaticSE: the statistics through a linear map or MLP."""

    def __init__(self, name: str, config: EncodingConfig, act: str) -> None:
        super().__init__()
        self.key = f"pestat_{name}"
        count, p = config.statistics, config.dim_pe
        self.raw_norm = nn.BatchNorm1d(count) if config.raw_norm_type.lower() == "batchnorm" else None
        if config.model.lower() == "linear":
            self.pe_encoder: nn.Module = nn.Linear(count, p)
        else:
            one_of("posenc model", config.model.lower(), ("mlp",))
            self.pe_encoder = nn.Sequential(*_mlp(count, p, config.layers, act))

    def forward(self, statistics: dict[str, Tensor], edge_index: Tensor, batch: Tensor) -> Tensor:
        x = _given(statistics, self.key)
        return self.pe_encoder(x if self.raw_norm is None else self.raw_norm(x))


class LapPE(nn.Module):
    """The set of (eigenvector's value at the node, eigenvalue), by a DeepSet or a Transformer."""

    def __init__(self, config: EncodingConfig, act: str) -> None:
        super().__init__()
        p, layers = config.dim_pe, config.layers
        self.transformer = config.model == "Transformer"
        self.raw_norm = nn.BatchNorm1d(config.max_freqs) if config.raw_norm_type.lower() == "batchnorm" else None
        if self.transformer:
            self.linear_A = nn.Linear(2, p)
            layer = nn.TransformerEncoderLayer(p, config.n_heads, batch_first=True)
            self.pe_encoder: nn.Module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        else:
            one_of("posenc_LapPE model", config.model, ("DeepSet",))
            linear, *rest = _mlp(2, p, layers, act)
            assert isinstance(linear, nn.Linear)
            self.linear_A = linear
            self.pe_encoder = nn.Sequential(*rest)
        self.post_mlp = nn.Sequential(*_mlp(p, p, config.post_layers, act)) if config.post_layers else None

    def forward(self, statistics: dict[str, Tensor], edge_index: Tensor, batch: Tensor) -> Tensor:
        vectors, values = _given(statistics, "EigVecs"), _given(statistics, "EigVals")
        if self.training:  # an eigenvector's sign says nothing
            vectors = vectors * (torch.randint(2, vectors.shape[1:], device=vectors.device) * 2 - 1)
        pairs = torch.cat((vectors[..., None], values), -1)  # [N, k, 2]
        absent = pairs[..., 0].isnan()
        x = pairs.nan_to_num()
        x = self.linear_A(x if self.raw_norm is None else self.raw_norm(x))
        x = self.pe_encoder(x, src_key_padding_mask=absent) if self.transformer else self.pe_encoder(x)
        x = x.masked_fill(absent[..., None], 0).sum(1)
        return x if self.post_mlp is None else self.post_mlp(x)


class SignMLP(nn.Module):
    """Linear, ReLU, BatchNorm, ..., Linear, on [..., channels]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.bns = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs[:-1])

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.lins, self.bns, strict=False):
            x = _channel_norm(norm, linear(x).relu())
        return self.lins[-1](x)


class SignGIN(nn.Module):
    """(1 + eps) x_i + sum_j x_j through an MLP, on x [N, k, channels]: every eigenvector by itself."""

    eps: Tensor

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.nn = SignMLP(widths)
        self.register_buffer("eps", torch.zeros(1))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        return self.nn((1 + self.eps) * x + sum_at(target, x[source], len(x)))


class SignPhi(nn.Module):
    def __init__(self, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        inputs, outputs = [1] + [hidden] * (layers - 1), [hidden] * (layers - 1) + [out]
        self.layers = nn.ModuleList(SignGIN((a, hidden, b)) for a, b in zip(inputs, outputs, strict=True))
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.layers[0](x, edge_index)
        for norm, layer in zip(self.bns, list(self.layers)[1:], strict=True):
            x = layer(_channel_norm(norm, x), edge_index)
        return x


class SignInvariantNet(nn.Module):
    """rho(phi(v) + phi(-v)): sums over the frequencies a graph has (DeepSet), or concatenates all of them (MLP)."""

    def __init__(self, config: EncodingConfig) -> None:
        super().__init__()
        one_of("posenc_SignNet model", config.model, ("DeepSet", "MLP"))
        self.sums = config.model == "DeepSet"
        hidden = config.phi_hidden_dim
        self.enc = SignPhi(hidden, config.phi_out_dim, config.layers)
        width = config.phi_out_dim * (1 if self.sums else config.max_freqs)
        self.rho = SignMLP((width, *[hidden] * (config.post_layers - 1), config.dim_pe))

    def forward(self, vectors: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = vectors.nan_to_num()[..., None]  # [N, k, 1]
        x = self.enc(x, edge_index) + self.enc(-x, edge_index)
        if not self.sums:
            return self.rho(x.flatten(1))
        nodes = batch.bincount()[batch]  # of each node's graph
        there = torch.arange(x.shape[1], device=x.device) < nodes[:, None]
        return self.rho((x * there[..., None]).sum(1))


class SignNet(nn.Module):
    def __init__(self, config: EncodingConfig) -> None:
        super().__init__()
        self.sign_inv_net = SignInvariantNet(config)

    def forward(self, statistics: dict[str, Tensor], edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.sign_inv_net(_given(statistics, "eigvecs_sn"), edge_index, batch)


class TypeEncoder(nn.Module):
    """An embedding of a category, [N] or [N, 1]."""

    def __init__(self, types: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(types, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[:, 0] if x.dim() > 1 else x)


class LinearEncoder(nn.Module):
    def __init__(self, d_in: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_in, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.float() if x.dim() > 1 else x.float()[:, None])


class AtomEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.atom_embedding_list = nn.ModuleList(nn.Embedding(types, width) for types in ATOM_TYPES)

    def forward(self, x: Tensor) -> Tensor:
        columns = zip(self.atom_embedding_list, x.unbind(1), strict=True)
        return torch.stack([embedding(column) for embedding, column in columns]).sum(0)


class BondEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bond_embedding_list = nn.ModuleList(nn.Embedding(types, width) for types in BOND_TYPES)

    def forward(self, x: Tensor) -> Tensor:
        columns = zip(self.bond_embedding_list, x.unbind(1), strict=True)
        return torch.stack([embedding(column) for embedding, column in columns]).sum(0)


def one_of(name: str, value: str, known: Sequence[str] | Mapping[str, object]) -> None:
    if value not in known:
        raise TersorError(f"graphgps' {name} is one of {', '.join(known)}, not {value!r}")


def sum_at(target: Tensor, values: Tensor, nodes: int) -> Tensor:
    """Sums of the edges' values [E, ...] at the nodes they lead to."""
    return values.new_zeros(nodes, *values.shape[1:]).index_add(0, target, values)


def _mlp(d_in: int, d_out: int, layers: int, act: str) -> list[nn.Module]:
    """Linear, activation, ... through 2 d_out; the last activation included."""
    widths = [d_in, *[2 * d_out] * (layers - 1), d_out]
    return [module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b), ACTIVATIONS[act]())]


def _channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm of the last axis of [N, channels] or [N, k, channels]."""
    return norm(x.flatten(0, -2)).view_as(x)


def _given(statistics: dict[str, Tensor], key: str) -> Tensor:
    if key not in statistics:
        given = ", ".join(statistics) or "none"
        raise TersorError(f"graphgps needs {key}=..., computed with tersor.data.graph_encodings; given are {given}")
    return statistics[key]
