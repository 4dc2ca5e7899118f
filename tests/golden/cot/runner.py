import numpy as np
import torch
from golden.harness import Case, check_parameters
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.data.chain_of_thought import DELETE, INSERT, REPLACE, division_table, edit_table, lis_lengths


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor | np.ndarray]:
    if "edit_costs" in case.config:
        return solvers(case)
    model = tersor.models.load("cot", case.state_dict(), **case.config)
    check_parameters(case, model)
    ids = case.inputs()["tokens"]
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    results = {"logits": logits, "hidden": model.transformer(ids, None)[0], "loss": loss.reshape(1)}
    return {name: results[name] for name in case.outputs}


def solvers(case: Case) -> dict[str, Tensor | np.ndarray]:
    assert case.config["edit_costs"] == {"insert": INSERT, "delete": DELETE, "replace": REPLACE}
    results: dict[str, Tensor | np.ndarray] = {}
    inputs = case.inputs()
    for name in case.outputs:
        if name == "lis_lengths":
            results[name] = np.array([lis_lengths(row) for row in inputs["lis_sequences"].tolist()])
        elif name.startswith("division_table_mod"):
            results[name] = division_table(int(name.removeprefix("division_table_mod")))
        else:
            pair = name.removesuffix("_matrix")
            results[name] = np.array(edit_table(inputs[f"{pair}_a"].tolist(), inputs[f"{pair}_b"].tolist()))
    return results
