"""MPNN+VN: message passing with a virtual node in the place of attention (Cai et al., ICML 2023, arXiv 2301.11956).

What it is for: predictions about graphs and their nodes where distant nodes matter, at a cost linear in nodes and
edges.

    model = tersor.models.create("mpnn_vn", dim_inner=96, layers_mp=5, dim_out=1)      # needs tersor[graphs]
    y = model(x, edge_index, edge_attr, batch)                                         # (graphs, dim_out)

Inputs, encoders and heads are GraphGPS' (graphgps.py). The virtual node has three published forms:

A. `virtual_node="updating"`: a vector v of each graph, learned at first. In layer l = 0..L-1, x [N, d], v [graphs, d]:

       x <- x + v of the node's graph;   (x, e) <- MPNN_l(x, e)
       t = sum of the graph's x + v;     v <- MLP_l(t), or v + MLP_l(t) with vn_residual;    not after the last layer

   MLP_l is twice Linear, BatchNorm, ReLU. vn_pooling="mean" is the form for climate data.
B. DeepSets beside message passing in a GPS layer: `graphgps` with layer_type="CustomGatedGCN+DSVN" (deepsets.py).
C. `virtual_node="none"`, and the node in the data: tersor.data.virtual_node.add_virtual_node on every graph. The
   variants for peptides and superpixels are this. The virtual node counts in mean pooling, as published; a head for
   nodes gives it a row too, the last of its graph, which means nothing.

MPNN_l: GatedGCN (as in GraphGPS), or dropout(ReLU(GINE or GCN)), with a residual unless residual=False.

Origin: Chen-Cai-OSU/MPNN-GT-Connection at 659c7b2, no licence stated (GraphGPS and LRGB, which it extends, are MIT).
Key names are the published ones.

Proven: the golden cases of the published code (A with GatedGCN and GINE, B, C's transform), parameter counts equal to
LRGB's rounded ones, no influence between graphs, reach of all nodes without edges, and that a virtual node computes
linear attention exactly. Not proven: any published accuracy. Missing: form C's `Hetero` variants with weights for each
kind of edge, and GCNII.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from tersor.layers.checks import at_least, one_of
from tersor.models.graph.encoders import EncodingConfig, sum_at
from tersor.models.graph.graphgps import (
    GINE,
    FeatureEncoder,
    GatedGCN,
    GPSLayerConfig,
    GraphGPSConfig,
    MLPHead,
    SANHead,
    encoder_keys,
    example_graphs,
)
from tersor.models.registry import register

LAYER_TYPES = {"gatedgcnconv": "CustomGatedGCN", "gineconv": "GINE", "gcnconv": "GCN"}


@dataclass(frozen=True, kw_only=True)
class MPNNVNConfig:
    layer_type: str = "gatedgcnconv"  # or gineconv, gcnconv
    dim_inner: int = 64  # d
    layers_mp: int = 4  # L
    residual: bool = True
    dropout: float = 0.0
    virtual_node: str = "updating"  # or "none"
    vn_residual: bool = False
    vn_pooling: str = "add"  # or "mean"
    act: str = "relu"
    head: str = "san_graph"  # or "graph", "inductive_node"
    pooling: str = "mean"  # of the head: or "add", "max"
    layers_post_mp: int = 1  # of the heads other than san_graph
    batchnorm: bool = True  # in those
    node_encoder: str = "TypeDictNode"  # as GraphGPS'
    edge_encoder: str = "TypeDictEdge"
    node_types: int = 28
    edge_types: int = 4
    dim_in: int = 1
    dim_edge: int = 1
    posenc_RWSE: EncodingConfig | None = None  # noqa: N815
    posenc_LapPE: EncodingConfig | None = None  # noqa: N815
    dim_out: int = 1

    def __post_init__(self) -> None:
        one_of("mpnn_vn", "layer_type", self.layer_type, LAYER_TYPES)
        one_of("mpnn_vn", "virtual_node", self.virtual_node, ("updating", "none"))
        one_of("mpnn_vn", "vn_pooling", self.vn_pooling, ("add", "mean"))
        at_least("mpnn_vn", 1, layers_mp=self.layers_mp, dim_inner=self.dim_inner)
        self.parts()

    def parts(self) -> GraphGPSConfig:
        """What GraphGPS' encoders and heads are made from."""
        return GraphGPSConfig(
            node_encoder=self.node_encoder,
            edge_encoder=self.edge_encoder,
            node_types=self.node_types,
            edge_types=self.edge_types,
            dim_in=self.dim_in,
            dim_edge=self.dim_edge,
            posenc_RWSE=self.posenc_RWSE,
            posenc_LapPE=self.posenc_LapPE,
            layer_type="None+None",
            dim_hidden=self.dim_inner,
            n_heads=1,
            act=self.act,
            head=self.head,
            pooling=self.pooling,
            layers_post_mp=self.layers_post_mp,
            batchnorm=self.batchnorm,
            dim_out=self.dim_out,
        )

    def layer(self) -> GPSLayerConfig:
        local = LAYER_TYPES[self.layer_type]
        return GPSLayerConfig(
            dim_h=self.dim_inner,
            local_gnn_type=local,
            global_model_type="None",
            num_heads=1,
            act="relu",  # the published layers know no other
            dropout=self.dropout,
        )


class ConvLayer(nn.Module):
    """x [N, d], edges [E, d] -> x + dropout(ReLU(conv(x))) and the same edges."""

    def __init__(self, config: MPNNVNConfig) -> None:
        super().__init__()
        d = config.dim_inner
        self.residual, self.with_edges = config.residual, config.layer_type == "gineconv"
        self.model = GINE(config.layer()) if self.with_edges else GCNConv(d, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor, _positions: None) -> tuple[Tensor, Tensor]:
        y = self.model(x, edge_index, edges, None) if self.with_edges else self.model(x, edge_index)
        y = self.dropout(y.relu())
        return (x + y if self.residual else y), edges


@register(
    "mpnn_vn",
    task="graph-predict",
    input="graph",
    paper="arXiv 2301.11956",
    variants={
        "mpnn_vn_peptides_func": (
            509_506,
            {
                "virtual_node": "none",
                "layers_mp": 5,
                "dim_inner": 138,
                "node_encoder": "Atom",
                "edge_encoder": "Bond",
                "head": "graph",
                "dim_out": 10,
            },
        ),
        "mpnn_vn_peptides_func_rwse": (
            506_398,
            {
                "virtual_node": "none",
                "layers_mp": 5,
                "dim_inner": 138,
                "node_encoder": "Atom+RWSE",
                "edge_encoder": "Bond",
                "posenc_RWSE": {"dim_pe": 20, "statistics": 16, "raw_norm_type": "BatchNorm"},
                "head": "graph",
                "dim_out": 10,
            },
        ),
        "mpnn_vn_peptides_func_gine": (
            475_706,
            {
                "layer_type": "gineconv",
                "virtual_node": "none",
                "layers_mp": 5,
                "dim_inner": 208,
                "node_encoder": "Atom",
                "edge_encoder": "Bond",
                "head": "graph",
                "dim_out": 10,
            },
        ),
        "mpnn_vn_peptides_struct": (
            509_645,
            {
                "virtual_node": "none",
                "layers_mp": 5,
                "dim_inner": 138,
                "node_encoder": "Atom",
                "edge_encoder": "Bond",
                "head": "graph",
                "dim_out": 11,
            },
        ),
        "mpnn_vn_vocsuperpixels": (
            370_581,
            {
                "virtual_node": "none",
                "layers_mp": 4,
                "dim_inner": 128,
                "node_encoder": "LinearNode",
                "edge_encoder": "LinearEdge",
                "dim_in": 14,
                "dim_edge": 2,
                "head": "inductive_node",
                "layers_post_mp": 3,
                "dim_out": 21,
            },
        ),
    },
    small={"dim_inner": 16, "layers_mp": 3},
    untraceable="how many graphs a batch holds is known only when it runs",
)
class MPNNVN(nn.Module):
    """x [N, ·], edge_index [2, E], edge_attr [E, ·], batch [N], statistics -> [graphs, dim_out], or [N, dim_out]."""

    def __init__(self, config: MPNNVNConfig) -> None:
        super().__init__()
        self.config = config
        d, parts = config.dim_inner, config.parts()
        self.encoder = FeatureEncoder(parts)
        gated = config.layer_type == "gatedgcnconv"
        self.gnn_layers = nn.ModuleList(
            GatedGCN(config.layer(), residual=config.residual) if gated else ConvLayer(config)
            for _ in range(config.layers_mp)
        )
        self.post_mp = (SANHead if config.head == "san_graph" else MLPHead)(parts)
        if config.virtual_node == "updating":
            self.virtualnode_embedding = nn.Embedding(1, d)
            nn.init.zeros_(self.virtualnode_embedding.weight)
            self.mlp_virtualnode_list = nn.ModuleList(_virtual_mlp(d) for _ in range(config.layers_mp - 1))
            self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, **statistics: Tensor) -> Tensor:
        x, edges = self.encoder(x, edge_index, edge_attr, batch, statistics)
        return self.post_mp(self.nodes(x, edge_index, edges, batch), batch)

    def nodes(self, x: Tensor, edge_index: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        """Encoded nodes and edges -> the nodes before the head [N, d]."""
        if self.config.virtual_node == "none":
            for layer in self.gnn_layers:
                x, edges = layer(x, edge_index, edges, None)
            return x
        sizes = batch.bincount()  # nodes of each graph
        v = self.virtualnode_embedding.weight.expand(len(sizes), -1)
        for i, layer in enumerate(self.gnn_layers):
            x, edges = layer(x + v[batch], edge_index, edges, None)
            if i < len(self.mlp_virtualnode_list):
                pooled = sum_at(batch, x, len(sizes))
                if self.config.vn_pooling == "mean":
                    pooled = pooled / sizes[:, None].clamp(min=1)
                update = self.dropout(self.mlp_virtualnode_list[i](pooled + v))
                v = v + update if self.config.vn_residual else update
        return x

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return example_graphs(self.config.parts(), batch_size)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return encoder_keys(state, self.encoder)


def _virtual_mlp(d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU())
