from typing import Any

import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.data.virtual_node import add_virtual_node
from tersor.models.config import config_from_dict
from tersor.models.loading import load_state


def run(case: Case) -> dict[str, Any]:
    if "dim_h" in case.config:
        return run_layer(case)
    return run_model(case) if "layers_mp" in case.config else add_virtual_node(**case.inputs())._asdict()


def run_model(case: Case) -> dict[str, Tensor]:
    model = tersor.models.load("mpnn_vn", case.state_dict(), **case.config)
    check_parameters(case, model)
    inputs = case.inputs()
    last = f"gnn_layers.{model.config.layers_mp - 1}"
    results = capture(model, ["", last], inputs)
    return {"pred": results[""], "final_nodes": results[last]}


@torch.no_grad()
def run_layer(case: Case) -> dict[str, Tensor]:
    from tersor.models.graph.graphgps import GPSLayer, GPSLayerConfig

    config = {**case.config}
    if "dsvn" in config:  # its norms are there whatever this says
        config["dsvn"] = {name: value for name, value in config["dsvn"].items() if name != "batchnorm"}
    layer = GPSLayer(config_from_dict(GPSLayerConfig, config, of=case.name))
    load_state(layer, case.state_dict(), what=case.name)
    check_parameters(case, layer.eval())
    x, edge_attr = layer(**case.inputs())
    return {"x": x, **({"edge_attr": edge_attr} if "edge_attr" in case.outputs else {})}
