from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    """The cases hold the base alone, with the try-on net's input channels."""
    model = tersor.models.load("sd3", case.state_dict(), **case.config)
    check_parameters(case, model)
    results: dict[str, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, streams: tuple[Tensor, Tensor]) -> None:
            results[f"block{index}_image"], results[f"block{index}_context"] = streams

        return hook

    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(keep(index))
    results["out"] = model(**case.inputs())
    return {name: results[name] for name in case.outputs}
