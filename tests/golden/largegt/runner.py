from typing import Any

import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.data.large_graph import Neighbours, hop_features
from tersor.models.graph.largegt import VectorQuantizer
from tersor.models.loading import load_state


def run(case: Case) -> dict[str, Any]:
    if "hops" in case.config:
        return run_hops(case)
    return run_codebook(case) if "num_embeddings" in case.config else run_model(case)


def run_hops(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    graph = Neighbours.of(inputs["adjacency"].nonzero().T, len(inputs["feat"]))
    whole = hop_features(graph, inputs["feat"], case.config["hops"])
    blocks = hop_features(graph, inputs["feat"], case.config["hops"], block=3)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(whole, blocks, strict=True))

    return {"hops": torch.stack(whole, 1)}


def run_codebook(case: Case) -> dict[str, Any]:
    config = case.config
    codebook = VectorQuantizer(config["num_embeddings"], config["embedding_dim"], config["decay"])
    load_state(codebook, case.state_dict(), what=case.name)
    inputs, outputs = case.inputs(), {}
    for name in sorted(inputs):
        outputs[f"idx{name[1:]}"] = codebook.train().update(inputs[name])[:, None]
    for name in ("embedding", "embedding_output", "ema_cluster_size", "ema_w"):
        outputs[name] = getattr(codebook, f"_{name}")
    return outputs | {"running_mean": codebook.bn.running_mean, "running_var": codebook.bn.running_var}


def run_model(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name != "skip"}  # without effect
    inputs = case.inputs()
    state, codes = case.state_dict(), inputs.pop("c_idx", None)
    if config["conv_type"] != "local":
        state["convs.0.c_idx"] = codes.to(torch.int16)
    model = tersor.models.load("largegt", state, **config)
    check_parameters(case, model)
    inputs["x"] = inputs["x"][: len(inputs["batch_idx"])]
    results = capture(model, ["", "convs.0"], inputs)
    wide = config["heads"] * config["hidden_channels"]
    parts = {"out": results[""], "local": results["convs.0"][:, :wide], "global": results["convs.0"][:, -wide:]}
    return {name: parts[name] for name in case.outputs}
