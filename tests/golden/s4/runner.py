from typing import Any

import numpy as np
import torch
from golden.harness import Case, check_parameters, run_model
from torch import Tensor

from tersor.layers.hippo import diagonal_spectrum, diagonalized_hippo, hippo_matrices
from tersor.models.loading import load_state
from tersor.models.sequence.s4 import S4Block, S4BlockConfig

# The published kernel of length 1024 is computed in complex64: it is 9.9e-6 from our float64.
TOLERANCE = {"logits": 2e-5, "features": 2e-5}
# Published arguments that say nothing about what is computed, or that our only way is the default of.
UNUSED = ("_name_", "lr", "wd", "verbose", "deterministic", "residual", "pool", "track_norms", "transposed")


def run(case: Case) -> dict[str, Any]:
    if "measures" in case.config:
        return run_initial_values(case)
    if "mode" in case.config:
        return run_block(case)
    return run_model(case, "s4", config=flat_config(case.config), outputs={"features": "model"})


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The published model's config is nested: task, backbone, layer. Ours is one."""
    model = {**config.get("model", {})}
    layer = model.pop("layer", {})
    task = {key: value for key, value in config.items() if key != "model"}
    return {k: v for k, v in {**task, **model, **layer}.items() if k not in UNUSED}


@torch.no_grad()
def run_block(case: Case) -> dict[str, Tensor]:
    config = {k: v for k, v in case.config.items() if k not in UNUSED or k == "transposed"}
    block = S4Block(S4BlockConfig(**config))
    load_state(block, block.convert_checkpoint(case.state_dict()), what=case.name)
    check_parameters(case, block.eval())
    x = case.inputs()["x"]
    channels_first = x if block.config.transposed else x.transpose(1, 2)
    outputs: dict[str, Tensor] = {}
    if {"y_step", "last_state"} & set(case.outputs):
        recurrence = block.recurrence()
        state, steps = recurrence.initial_state(len(x)), []
        for u in channels_first.unbind(-1):
            y, state = block.step(u, state, recurrence)
            steps.append(y)
        outputs["y_step"] = torch.stack(steps, -1 if block.config.transposed else 1)
        outputs["last_state"] = torch.view_as_real(state)
    outputs["y"] = block(x)
    outputs["y_rate"] = block(x, rate=2.0)
    outputs["kernel"] = block.layer.kernel(channels_first.shape[-1])[0]
    return {name: outputs[name] for name in case.outputs}


def run_initial_values(case: Case) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for init in case.config["s4d_inits"]:
        spectrum = diagonal_spectrum(init, 64)[None]
        outputs |= {f"s4d_{init}_A_real": spectrum.real, f"s4d_{init}_A_imag": spectrum.imag}
    for measure in case.config["measures"]:
        for N in case.config["N"]:
            A, B = hippo_matrices(measure, N)
            W, P, V_B = diagonalized_hippo(measure, N, rank=2 if measure == "legt" else 1)
            product = V_B * P.conj()
            outputs |= {
                f"{measure}{N}_{name}": value
                for name, value in {
                    "A": A,
                    "B": B,
                    "absP": np.abs(P.squeeze(0) if len(P) == 1 else P),
                    "absB": np.abs(V_B),
                    "BconjP_real": product.squeeze(0).real if len(P) == 1 else product.real,
                    "BconjP_imag": product.squeeze(0).imag if len(P) == 1 else product.imag,
                }.items()
            }
            for part in ("real", "imag"):  # one of the two may be rounding noise: the size of W is the yardstick
                case.check(f"{measure}{N}_W_{part}", getattr(W, part), size=np.abs(W).max())
                name = f"{measure}{N}_BconjP_{part}"
                case.check(name, outputs.pop(name), 5e-6, size=np.abs(product).max())
    return outputs
