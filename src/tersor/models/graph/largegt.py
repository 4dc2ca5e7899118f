"""LargeGT, a graph transformer for one graph of millions of nodes (Dwivedi et al., 2023, arXiv 2312.11109).

What it is for: classifying the nodes of a large graph. A target sees K nodes sampled within two hops, each as three
tokens (its features and those propagated over one and two hops: four hops in all), and a codebook of the whole graph.

    model = tersor.models.create("largegt", num_nodes=n, in_channels=100, out_channels=47)
    seq = hop_tokens(sample_nodes(graph, batch_idx, 100, random), (x, *hops))       # tersor.data.large_graph
    logits = model(seq, x[batch_idx], pos_enc[batch_idx], batch_idx)                # (B, out_channels)

seq [B, 3K, in], x [B, in], pos_enc [B, g] (a fixed embedding of nodes, node2vec as published), batch_idx [B]. Every
head has the full width d. t = fc_in_seq(seq), h = fc_in(x), both MLPs in -> d:

    local   u = LN(res_proj(t') + MHA(LN(t')));  t' = W t;   u_0 + sum_j softmax_j(w [u_0; u_j]) u_j            [B, Hd]
    global  q = W_q [W h; pos_enc], k = W_k E, v = W_v E[:, :g];  softmax(q k^T / sqrt(d) + log count) v         [B, Hd]
    logits  fc_out(ff([local, global]))

E [C, 2g] is the codebook, count_c how many nodes of the graph the buffer c_idx assigns to code c; a code without nodes
is left out. In training, after it is used, the codebook follows [W h; pos_enc] by moving averages, normalised by
running statistics, and c_idx of the batch becomes the nearest codes. No gradient reaches it.

Origin: snap-research/LargeGT at 5323269, MIT, whose key names these are, with weights that nothing uses (lin_key,
lin_query, lin_value, lin_skip, out_proj) and c_idx (int16, so at most 32,767 codes). Published quirk not kept: a batch
of one node loses its batch axis. The published option `skip` is without effect.

Proven: the golden cases of the published code (both sizes, three codebook updates, hop features), its parameter count,
the properties of the codebook and of the order of tokens, sampled nodes against lists made by hand; a training step takes
the same time on graphs of 0.1, 1 and 10 million nodes, the last with 100 million edges in 3.4 GB
(benchmarks/results/large_graph.md). Not proven: published accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of
from tersor.models.registry import register

_LOCAL_DROPOUT = 0.3


@dataclass(frozen=True, kw_only=True)
class LargeGTConfig:
    num_nodes: int = 2_449_029  # of the graph: ogbn-products'
    in_channels: int = 100
    hidden_channels: int = 256  # d
    out_channels: int = 47
    global_dim: int = 64  # g
    num_layers: int = 1  # only one, as published
    heads: int = 2  # H
    ff_dropout: float = 0.5
    attn_dropout: float = 0.0
    conv_type: str = "full"  # or "local", "global"
    num_centroids: int = 4096  # C
    no_bn: bool = False
    norm_type: str = "batch_norm"  # or "layer_norm"
    sample_node_len: int = 100  # K

    def __post_init__(self) -> None:
        one_of("largegt", "conv_type", self.conv_type, ("full", "local", "global"))
        one_of("largegt", "norm_type", self.norm_type, ("batch_norm", "layer_norm"))
        one_of("largegt", "num_layers", self.num_layers, (1,))
        at_least("largegt", 1, num_nodes=self.num_nodes, heads=self.heads, num_centroids=self.num_centroids)
        at_least("largegt", 2, sample_node_len=self.sample_node_len)
        if self.num_centroids > 32767:
            raise TersorError(
                f"largegt's codes are numbered in 16 bits: at most 32767 centroids, not {self.num_centroids}"
            )


class MultiHeadAttention(nn.Module):
    """[B, n, d] -> [B, n, H d]."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(d, heads * d) for _ in range(3))
        self.output_layer = nn.Linear(heads * d, heads * d)

    def forward(self, y: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(y), "b n (h d) -> b h n d", h=self.heads)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        return self.output_layer(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class EncoderLayer(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(d)
        self.self_attention = MultiHeadAttention(d, heads)
        self.res_proj = nn.Linear(d, heads * d)
        self.dropout = nn.Dropout(_LOCAL_DROPOUT)

    def forward(self, t: Tensor) -> Tensor:
        y = self.dropout(self.self_attention(self.self_attention_norm(t)))
        return self.dropout(self.res_proj(t) + y)


class LocalModule(nn.Module):
    """tokens [B, 3K, d] -> [B, H d]."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.att_embeddings_nope = nn.Linear(d, d)
        self.layers = nn.ModuleList([EncoderLayer(d, heads)])
        self.final_ln = nn.LayerNorm(heads * d)
        self.out_proj = nn.Linear(2 * d, d)  # not used, as published
        self.attn_layer = nn.Linear(2 * heads * d, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        t = self.att_embeddings_nope(tokens)
        for layer in self.layers:
            t = layer(t)
        u = self.final_ln(t)
        target, others = u[:, :1], u[:, 1:]
        scores = self.attn_layer(torch.cat((target.expand_as(others), others), 2)).softmax(1)
        return target[:, 0] + (others * scores).sum(1)


class VectorQuantizer(nn.Module):
    """Codes of dimension 2g that follow what `update` is given, in the space that its running statistics normalise."""

    _embedding: Tensor
    _embedding_output: Tensor
    _ema_cluster_size: Tensor
    _ema_w: Tensor

    def __init__(self, codes: int, dim: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("_embedding", torch.randn(codes, 2 * dim))
        self.register_buffer("_embedding_output", torch.randn(codes, 2 * dim))
        self.register_buffer("_ema_cluster_size", torch.zeros(codes))
        self.register_buffer("_ema_w", torch.randn(codes, 2 * dim))
        self.bn = nn.BatchNorm1d(2 * dim, affine=False)

    def codes(self) -> Tensor:
        """[C, 2g], not normalised. In training a copy: the gradient needs those of before the update."""
        return self._embedding_output.clone() if self.training else self._embedding_output

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """x [B, 2g] -> the nearest codes [B] of before the update."""
        z, E, eps = self.bn(x), self._embedding, 1e-5
        index = (z.square().sum(1, keepdim=True) + E.square().sum(1) - 2 * z @ E.T).argmin(1)
        counts = torch.zeros_like(self._ema_cluster_size).index_add(0, index, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(E).index_add(0, index, z)
        size = self._ema_cluster_size.lerp(counts, 1 - self.decay)
        total = size.sum()
        self._ema_cluster_size.copy_((size + eps) / (total + len(E) * eps) * total)
        self._ema_w.lerp_(sums, 1 - self.decay)
        self._embedding.copy_(self._ema_w / self._ema_cluster_size[:, None])
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert var is not None
        self._embedding_output.copy_(self._embedding * (var + eps).sqrt() + mean)
        return index


class LargeGTLayer(nn.Module):
    c_idx: Tensor

    def __init__(self, config: LargeGTConfig) -> None:
        super().__init__()
        d, g, heads, codes = config.hidden_channels, config.global_dim, config.heads, config.num_centroids
        self.config = config
        self._counted: tuple[Tensor, int, Tensor] | None = None  # c_idx and its version, and its counts
        for name in ("lin_key", "lin_query", "lin_value", "lin_skip"):  # not used, as published
            self.add_module(name, nn.Linear(d, heads * d))
        self.local_module = LocalModule(d, heads)
        if config.conv_type != "local":
            self.vq = VectorQuantizer(codes, g)
            self.register_buffer("c_idx", torch.randint(codes, (config.num_nodes,), dtype=torch.int16))
            self.lin_proj_g = nn.Linear(d, g)
            self.lin_key_g, self.lin_query_g = nn.Linear(2 * g, heads * d), nn.Linear(2 * g, heads * d)
            self.lin_value_g = nn.Linear(g, heads * d)

    def forward(self, seq: Tensor, x: Tensor, pos_enc: Tensor, batch_idx: Tensor) -> Tensor:
        if self.config.conv_type == "local":
            return self.local_module(seq)
        if self.config.conv_type == "global":
            return self.attend_to_codes(x, pos_enc, batch_idx)
        return torch.cat((self.local_module(seq), self.attend_to_codes(x, pos_enc, batch_idx)), 1)

    def attend_to_codes(self, x: Tensor, pos_enc: Tensor, batch_idx: Tensor) -> Tensor:
        x = torch.cat((self.lin_proj_g(x), pos_enc), 1)  # [B, 2g]
        E = self.vq.codes()
        q, k, v = (
            rearrange(y, "n (h d) -> h n d", h=self.config.heads)
            for y in (self.lin_query_g(x), self.lin_key_g(E), self.lin_value_g(E[:, : self.config.global_dim]))
        )
        counts = self.counts()
        dropout = self.config.attn_dropout if self.training else 0.0
        bias = counts.to(q.dtype).log()[None]
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], bias, dropout)[0]  # ONNX's has a batch
        if self.training:
            self._assign(batch_idx, self.vq.update(x), counts)
        return rearrange(y, "h n d -> n (h d)")

    def counts(self) -> Tensor:
        """[C]: how many nodes of the graph have each code. Kept between training steps: none reads all nodes."""
        if self.training and self._counted is not None:
            of, version, counts = self._counted
            if of is self.c_idx and version == self.c_idx._version:
                return counts
        counts = torch.zeros(self.config.num_centroids, dtype=torch.int64, device=self.c_idx.device)
        for part in torch.split(self.c_idx, 1 << 20):
            counts = counts.index_add(0, part.long(), torch.ones_like(part, dtype=torch.int64))
        return counts

    @torch.no_grad()
    def _assign(self, nodes: Tensor, codes: Tensor, counts: Tensor) -> None:
        one = torch.ones_like(codes)
        before = self.c_idx[nodes].long()
        self.c_idx[nodes] = codes.to(torch.int16)
        after = self.c_idx[nodes].long()  # a node that is twice in the batch has one code
        counts = counts.clone()
        if len(nodes) == len(torch.unique(nodes)):
            counts = counts.index_add(0, before, -one).index_add(0, after, one)
            self._counted = (self.c_idx, self.c_idx._version, counts)
        else:
            self._counted = None


@register(
    "largegt",
    task="node-classify",
    input="graph",
    paper="arXiv 2312.11109",
    variants={
        "largegt_products": (2_550_384, {}),
        "largegt_snap_patents": (
            739_654,
            {
                "num_nodes": 2_923_922,
                "in_channels": 269,
                "hidden_channels": 128,
                "out_channels": 5,
                "sample_node_len": 50,
            },
        ),
        "largegt_papers100m": (
            10_141_485,
            {
                "num_nodes": 111_059_956,
                "in_channels": 128,
                "hidden_channels": 512,
                "out_channels": 172,
                "global_dim": 128,
            },
        ),
    },
    small={
        "num_nodes": 40,
        "in_channels": 8,
        "hidden_channels": 16,
        "out_channels": 5,
        "global_dim": 4,
        "num_centroids": 6,
        "sample_node_len": 4,
    },
)
class LargeGT(nn.Module):
    """seq [B, 3K, in], x [B, in], pos_enc [B, g], batch_idx [B] -> logits [B, out_channels]."""

    def __init__(self, config: LargeGTConfig) -> None:
        super().__init__()
        self.config = config
        d, wide = config.hidden_channels, config.heads * config.hidden_channels
        self.fc_in = nn.Sequential(
            nn.Linear(config.in_channels, d),
            *_norm(config, d),
            nn.ReLU(),
            nn.Dropout(config.ff_dropout),
            nn.Linear(d, d),
        )
        self.fc_in_seq = nn.Sequential(
            nn.Linear(config.in_channels, d), nn.ReLU(), nn.Dropout(config.ff_dropout), nn.Linear(d, d)
        )
        self.convs = nn.ModuleList([LargeGTLayer(config)])
        ff = nn.Sequential(
            nn.Linear(2 * wide if config.conv_type == "full" else wide, wide),
            *_norm(config, wide),
            nn.ReLU(),
            nn.Dropout(config.ff_dropout),
            nn.Linear(wide, d),
            *_norm(config, d),
            nn.ReLU(),
            nn.Dropout(config.ff_dropout),
        )
        self.ffs = nn.ModuleList([ff])
        self.fc_out = nn.Linear(d, config.out_channels)

    def forward(self, seq: Tensor, x: Tensor, pos_enc: Tensor, batch_idx: Tensor) -> Tensor:
        x, seq = self.fc_in(x), self.fc_in_seq(seq)
        for conv, ff in zip(self.convs, self.ffs, strict=True):
            x = ff(conv(seq, x, pos_enc, batch_idx))
        return self.fc_out(x)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        return {
            "seq": torch.randn(batch_size, 3 * config.sample_node_len, config.in_channels),
            "x": torch.randn(batch_size, config.in_channels),
            "pos_enc": torch.randn(batch_size, config.global_dim),
            "batch_idx": torch.arange(batch_size),
        }


def _norm(config: LargeGTConfig, width: int) -> list[nn.Module]:
    norms: dict[str, Callable[[int], nn.Module]] = {"batch_norm": nn.BatchNorm1d, "layer_norm": nn.LayerNorm}
    return [] if config.no_bn else [norms[config.norm_type](width)]
