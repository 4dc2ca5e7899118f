from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.data.graph_encodings import (
    electrostatic_encoding,
    heat_kernel_encoding,
    laplacian_eigenpairs,
    random_walk_encoding,
)
from tersor.errors import TersorError

LAP = {"model": "DeepSet", "dim_pe": 4, "layers": 2, "max_freqs": 5}
SMALL: dict[str, Any] = {"node_encoder": "TypeDictNode", "dim_hidden": 16, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "GIN": {"layer_type": "GIN+Transformer"},
    "GCN": {"layer_type": "GCN+None"},
    "GENConv": {"layer_type": "GENConv+Transformer"},
    "GAT": {"layer_type": "GAT+Transformer", "layer_norm": True, "batch_norm": False},
    "PNA": {"layer_type": "PNA+Transformer", "pna_degrees": (0, 1, 9)},
    "attention alone": {"layer_type": "None+Transformer", "batch_norm": False},
    "performer": {"layer_type": "CustomGatedGCN+Performer"},
    "nodes": {"head": "inductive_node", "layers_post_mp": 3, "dim_out": 5},
    "numbers": {"node_encoder": "LinearNode", "edge_encoder": "LinearEdge", "dim_in": 3, "dim_edge": 2},
    "molecules": {"node_encoder": "Atom+LapPE+RWSE", "edge_encoder": "Bond", "posenc_LapPE": LAP,
                  "posenc_RWSE": {"dim_pe": 3, "model": "MLP", "layers": 2, "statistics": 6}, "head": "graph",
                  "layers_post_mp": 2, "pooling": "max"},
    "LapPE by a transformer": {"node_encoder": "TypeDictNode+LapPE",
                               "posenc_LapPE": {**LAP, "model": "Transformer", "n_heads": 2, "post_layers": 2,
                                                "raw_norm_type": "BatchNorm"}},
    "heat": {"node_encoder": "TypeDictNode+HKdiagSE", "posenc_HKdiagSE": {"dim_pe": 4, "statistics": 4}},
    "charges": {"node_encoder": "ElstaticSE", "posenc_ElstaticSE": {"dim_pe": 4, "statistics": 10}},
    "SignNet": {"node_encoder": "TypeDictNode+SignNet",
                "posenc_SignNet": {"model": "MLP", "dim_pe": 4, "layers": 3, "post_layers": 2, "max_freqs": 5,
                                   "phi_hidden_dim": 8}},
}  # fmt: skip


def build(**config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("graphgps", **{**SMALL, **config}).eval()


def alone(inputs: dict[str, Tensor], graph: int) -> dict[str, Tensor]:
    """One graph of a batch."""
    nodes = inputs["batch"] == graph
    edges = nodes[inputs["edge_index"][0]]
    first = int(nodes.nonzero()[0])
    one = {key: value[edges if key == "edge_attr" else nodes] for key, value in inputs.items() if key != "edge_index"}
    return one | {"edge_index": inputs["edge_index"][:, edges] - first, "batch": torch.zeros_like(one["batch"])}


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_graph_counts_for_itself_and_its_nodes_have_no_order(config: dict[str, Any]) -> None:
    model = build(**config)
    inputs = model.example_inputs(3)
    together = model(**inputs)
    own = alone(inputs, 1)
    if model.config.layer_type.endswith("Performer"):  # published: depends on padding
        together = model(**own)
    elif model.config.head == "inductive_node":
        together = together[inputs["batch"] == 1]
    else:
        together = together[1:2]
    torch.testing.assert_close(model(**own), together, rtol=1e-4, atol=1e-5)

    order = torch.randperm(len(own["x"]))
    shuffled = {key: value if key in ("edge_index", "edge_attr") else value[order] for key, value in own.items()}
    shuffled["edge_index"] = order.argsort()[own["edge_index"]]
    expected = together[order] if model.config.head == "inductive_node" else together
    torch.testing.assert_close(model(**shuffled), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["DeepSet", "MLP"])
def test_signnet_does_not_see_the_signs_of_eigenvectors(kind: str) -> None:
    encoding = {"model": kind, "dim_pe": 4, "layers": 3, "post_layers": 2, "max_freqs": 5, "phi_hidden_dim": 8}
    model = build(node_encoder="TypeDictNode+SignNet", posenc_SignNet=encoding)
    inputs = model.example_inputs(2)
    flipped = {**inputs, "eigvecs_sn": inputs["eigvecs_sn"] * torch.tensor([1, -1, -1, 1, -1])}
    torch.testing.assert_close(model(**flipped), model(**inputs), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_training_run_with_the_old_chirality_loads() -> None:
    config = {**SMALL, "node_encoder": "Atom", "edge_encoder": "Bond"}
    model = build(**config)
    state = {f"model.{k.replace('in_proj.', 'in_proj_')}": v for k, v in model.state_dict().items()}
    name = "model.encoder.node_encoder.atom_embedding_list.1.weight"
    state[name] = state[name][:4]
    loaded = tersor.models.load("graphgps", state, **config)
    inputs = model.example_inputs(2)
    inputs["x"][:, 1] %= 4
    torch.testing.assert_close(loaded(**inputs), model(**inputs))


def test_a_missing_statistic_is_named() -> None:
    model = build(node_encoder="TypeDictNode+LapPE", posenc_LapPE=LAP)
    inputs = model.example_inputs(2)
    del inputs["EigVecs"]
    with pytest.raises(TersorError, match="EigVecs"):
        model(**inputs)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"layer_type": "GINE"}, "'GINE'"),
        ({"layer_type": "GINE+BigBird"}, "'BigBird'"),
        ({"layer_type": "PNA+None"}, "pna_degrees"),
        ({"node_encoder": "TypeDictNode+RWSE"}, "posenc_RWSE"),
        ({"n_heads": 3}, "3 heads"),
        ({"layer_norm": True}, "not both"),
        ({"head": "edges"}, "'edges'"),
    ],
)
def test_refuses_what_cannot_work(config: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        build(**config)


PATH = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])  # 0 - 1 - 2 - 3


def test_encodings_of_a_path_are_those_worked_out_by_hand() -> None:
    walks = random_walk_encoding(PATH, 5, (1, 2))  # node 4 has no edge
    torch.testing.assert_close(walks, torch.tensor([[0, 0.5], [0, 0.75], [0, 0.75], [0, 0.5], [0, 0]]))
    values, vectors = laplacian_eigenpairs(PATH, 4, 6, laplacian_norm="none")
    torch.testing.assert_close(values[0, :4, 0], torch.tensor([0, 2 - 2**0.5, 2, 2 + 2**0.5]), rtol=1e-5, atol=1e-6)
    assert values[:, 4:].isnan().all()
    assert vectors[:, 4:].isnan().all()
    torch.testing.assert_close(vectors[:, 0].abs(), torch.full((4,), 0.5))
    long = heat_kernel_encoding(PATH, 4, (0.0, 100.0))
    torch.testing.assert_close(long, torch.tensor([[0.75, 0.0]]).expand(4, 2), rtol=1e-5, atol=1e-6)
    charges = electrostatic_encoding(PATH, 4)
    assert (charges[:, 1] == 0).all()  # no potential is above a charge's own
    torch.testing.assert_close(charges[0, 0], torch.tensor(-1.5))  # half of three unit resistors


@pytest.mark.parametrize("norm", ["sym", "rw"])
def test_normalised_laplacians_have_eigenvectors_of_their_own(norm: str) -> None:
    values, vectors = laplacian_eigenpairs(PATH, 4, 4, laplacian_norm=norm)
    A = torch.zeros(4, 4).index_put(tuple(PATH), torch.ones(1))
    degree = A.sum(1)
    L = torch.eye(4) - (A / degree[:, None] if norm == "rw" else A / (degree[:, None] * degree).sqrt())
    torch.testing.assert_close(L @ vectors, vectors * values[0, :, 0], rtol=1e-4, atol=1e-5)
