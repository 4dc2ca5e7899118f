import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.control.morphology import limb_places, limb_relation

WITHOUT_EFFECT = ("dropout", "graph", "parents", "traversal_types")  # dropout is always off


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "feature_size" not in case.config:
        return run_morphology(case)
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("sgrl", case.state_dict(), **config)
    check_parameters(case, model)
    inputs = case.inputs()
    inputs.pop("parents", None)
    vectors, scalars = model.encode(**inputs)
    outputs = {"out": model(**inputs), "enc_geometric": vectors, "enc_scalar": scalars}
    if "action" in case.outputs:
        outputs["action"] = model.act(**inputs)
    return outputs


def run_morphology(case: Case) -> dict[str, Tensor]:
    outputs = {}
    for key, parents in case.inputs().items():
        name, body = key.removesuffix("_parents"), parents.flatten().tolist()
        relation = limb_relation(body, damping=case.config["ppr_damping"])
        for part, of in zip(("ppr", "sym_lap", "distance"), relation.unbind(-1), strict=True):
            outputs[f"{name}_{part}"] = of
        outputs[f"{name}_traversals"] = limb_places(body, case.config["traversal_types"])
    return outputs
