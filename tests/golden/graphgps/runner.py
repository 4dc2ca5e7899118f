import inspect
from typing import Any

import numpy as np
import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.data import graph_encodings
from tersor.models.loading import load_state


def run(case: Case) -> dict[str, Any]:
    if "hkdiag_times" in case.config:
        return run_encodings(case)
    return run_layer(case) if "dim_h" in case.config else run_whole(case)


@torch.no_grad()
def run_layer(case: Case) -> dict[str, Tensor]:
    from tersor.models.config import config_from_dict
    from tersor.models.graph.graphgps import GPSLayer, GPSLayerConfig

    layer = GPSLayer(config_from_dict(GPSLayerConfig, case.config, of=case.name))
    load_state(layer, case.state_dict(), what=case.name)
    check_parameters(case, layer.eval())
    known = inspect.signature(layer.forward).parameters
    x, edge_attr = layer(**{name: value for name, value in case.inputs().items() if name in known})
    return {"x": x, **({"edge_attr": edge_attr} if "edge_attr" in case.outputs else {})}


def run_whole(case: Case) -> dict[str, Tensor]:
    model = tersor.models.load("graphgps", case.state_dict(), **model_config(case.config))
    check_parameters(case, model)
    inputs = case.inputs()
    target = inputs.pop("target", None)
    last = f"layers.{len(model.layers) - 1}"
    results = capture(model, ["", "encoder", last], inputs)
    outputs = {"pred": results[""], "encoded": results["encoder"], "final_nodes": results[last]}
    if target is not None:
        loss = (model(**inputs) - target).abs().mean()
        loss.backward()
        outputs["l1_loss"] = loss.detach()[None]
        parameters = {k.replace("in_proj.", "in_proj_"): p for k, p in model.named_parameters()}
        for name in case.outputs:
            if name.startswith("gradnorm:"):
                outputs[name] = parameters[name.removeprefix("gradnorm:")].grad.norm()[None]
    return {name: outputs[name] for name in case.outputs}


def model_config(published: dict[str, Any]) -> dict[str, Any]:
    """The published YAML sections in our field names."""
    gt, gnn = published["gt"], published["gnn"]
    node, edge, node_types, edge_types = published["encoders"]
    config = {key: gt[key] for key in ("layer_type", "layers", "n_heads", "dim_hidden", "dropout", "attn_dropout")}
    config |= {key: gt[key] for key in ("layer_norm", "batch_norm", "pna_degrees") if key in gt}
    config |= {"node_encoder": node, "edge_encoder": edge, "act": gnn["act"], "batchnorm": gnn["batchnorm"]}
    config |= {"node_types": node_types or 1, "edge_types": edge_types or 1, "dim_in": published["dim_in"]}
    config |= {
        "layers_post_mp": gnn["layers_post_mp"],
        "pooling": published["pooling"],
        "dim_out": published["dim_out"],
    }
    config["head"] = "graph" if gnn["head"] == "default" else gnn["head"]
    for key, section in published.items():
        if key.startswith("posenc_"):
            unused = ("enable", "pass_as_var", "eigen", "kernel")
            config[key] = {name: value for name, value in section.items() if name not in unused}
            if "eigen" in section:
                config[key]["max_freqs"] = section["eigen"]["max_freqs"]
            if "ElstaticSE" in key:
                config[key]["statistics"] = 10
            elif "kernel" in section:
                config[key]["statistics"] = len(section["kernel"]["times"])
    return config


def run_encodings(case: Case) -> dict[str, Any]:
    config, outputs = case.config, {}
    first, last = config["rwse_times"]
    for name, edge_index in case.inputs().items():
        graph, nodes = name.removesuffix("_edge_index"), int(edge_index.max()) + 1
        outputs[f"{graph}_rwse"] = graph_encodings.random_walk_encoding(edge_index, nodes, range(first, last + 1))
        outputs[f"{graph}_hkdiag"] = graph_encodings.heat_kernel_encoding(edge_index, nodes, config["hkdiag_times"])
        for kind, how in (("lap", config), ("sym", config["signnet"])):
            values, vectors = graph_encodings.laplacian_eigenpairs(
                edge_index,
                nodes,
                how["max_freqs"],
                laplacian_norm=how["laplacian_norm"],
                eigvec_norm=config["eigvec_norm"],
            )
            outputs[f"{graph}_{kind}_eigvals"] = values.nan_to_num(-1)
            outputs[f"{graph}_{kind}_abs_eigvecs"] = vectors.abs().nan_to_num(-1)
        # The published numbers of this one are a float32 inverse of a singular matrix: rounding errors of about 1.
        exact = graph_encodings.electrostatic_encoding(edge_index, nodes).numpy()
        case.check(f"{graph}_elstatic", exact, 1, size=1)
        wanted = case.expected(f"{graph}_elstatic").reshape(nodes, 10)
        assert np.array_equal(exact[:, 5], exact[:, 1])
        assert np.array_equal(wanted[:, 5], wanted[:, 1])
    return outputs
