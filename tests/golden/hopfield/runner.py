import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models

SYSTEMS = {"Hopfield": "hopfield", "HopfieldPooling": "hopfield_pooling", "HopfieldLayer": "hopfield_layer"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    config = {**case.config}
    model = tersor.models.load(SYSTEMS[config.pop("cls")], case.state_dict(), **config)
    check_parameters(case, model)
    inputs = case.inputs()
    names = {"x": "state", "y": "stored", "p": "projection", "pad_mask": "padding_mask"}
    if isinstance(model, tersor.models.find("hopfield_pooling").load_class()):
        names["x"] = "stored"
    inputs = {names.get(name, name): value for name, value in inputs.items()}
    outputs = {"y": model(**inputs)}
    if "association" in case.outputs:
        outputs["association"] = model.association(**inputs)
    return outputs
