"""One layer of the published network with its nodes masked, the worth of its heads, and the masks of weights."""

from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor

from tersor.layers.pruned_graph_attention import PrunedGraphAttention
from tersor.methods.structure import gtsp_schedule
from tersor.models.graph.graphgps import GPSLayer, GPSLayerConfig

KEYS = {
    "conv.": "local_model.",
    "attn.in_proj_": "self_attn.in_proj.",
    "attn.out_proj": "self_attn.out_proj",
    "gumbel": "self_attn.score",
    "mlp.0": "ff_linear1",
    "mlp.3": "ff_linear2",
    "norm1.module": "norm1_local",
    "norm2.module": "norm1_attn",
    "norm3.module": "norm2",
}


def run(case: Case) -> dict[str, Tensor]:
    if "steps" in case.config:
        return weight_masks(case)
    return tokens(case) if "token_ratio" in case.config else heads(case)


def layer_of(case: Case) -> Any:
    config = case.config
    made = GPSLayerConfig(dim_h=config["channels"], num_heads=config["heads"], local_gnn_type="GIN")
    layer: Any = GPSLayer(made).eval()
    width, ratio = config["channels"] // config["heads"], config.get("token_ratio")
    layer.self_attn = PrunedGraphAttention.in_place_of(
        layer.self_attn,
        heads=config["heads"],
        head_dim=width,
        token_ratio=1.0 if ratio is None else min(ratio, 0.5),  # below 1 it has the scores that the case holds
        masked=True,
    )
    layer.self_attn.token_ratio = 1.0 if ratio is None else ratio
    state = case.state_dict()
    for published, ours in KEYS.items():
        state = {key.replace(published, ours, 1) if key.startswith(published) else key: v for key, v in state.items()}
    missing, unknown = layer.load_state_dict(state, strict=False)
    assert not unknown
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return layer.eval()


@torch.no_grad()
def tokens(case: Case) -> dict[str, Tensor]:
    layer, inputs = layer_of(case), case.inputs()
    check_parameters(case, layer)
    attention, seen = layer.self_attn, []

    def mask(x: Tensor) -> Tensor:
        seen.append(PrunedGraphAttention.mask_tokens(attention, x, inputs["exp_noise"]))
        return seen[-1]

    attention.mask_tokens = mask
    x, _ = layer(inputs["x"], inputs["edge_index"], None, inputs["batch"])
    return {"x": x, "attn_input": seen[0], "kept": (seen[0] != 0).any(-1).float()}


def heads(case: Case) -> dict[str, Tensor]:
    layer, inputs = layer_of(case), case.inputs()
    check_parameters(case, layer)
    outputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    layer.self_attn.register_forward_hook(keep)
    x, _ = layer(inputs["x"], inputs["edge_index"], None, inputs["batch"])
    (x * inputs["readout"]).sum().backward()
    assert outputs[0].grad is not None
    importance, growth = gtsp_schedule.head_scores(outputs[0], outputs[0].grad, case.config["heads"])
    return {"x": x, "grad_scores": importance, "grad_norm": growth}


def weight_masks(case: Case) -> dict[str, Tensor]:
    config = case.config
    assert config["growth"] == "gradient"
    curve = gtsp_schedule.Curve(
        config["init_density"],
        config["final_density"],
        start=config["init_prune_epoch"] * config["steps_per_epoch"],
        end=config["final_prune_epoch"] * config["steps_per_epoch"],
        frequency=config["update_frequency"],
    )
    weights = case.state_dict()
    gradients = {name: case.inputs()[f"grad:{name}"] for name in weights}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    found = {}
    way = config["method"].lower()
    uniform = way.endswith("_uniform")
    for step in config["steps"]:
        pruned, masks = gtsp_schedule.update_weights(
            weights,
            gradients,
            masks,
            way="uniform" if uniform else way,
            density=curve.density(step),
            rate=config["prune_rate"],
        )
        if way == "granet_uniform":
            _, masks = gtsp_schedule.update_weights(
                weights, gradients, masks, way="dst", density=None, rate=config["prune_rate"]
            )
        for name in weights:
            found |= {f"prune{step}.{name}": pruned[name].float(), f"regrown{step}.{name}": masks[name].float()}
    return {name: value for name, value in found.items() if name in case.outputs}
