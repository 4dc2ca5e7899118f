import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.associative.hopfield import HopfieldCore

SYSTEMS = {"Hopfield": "hopfield", "HopfieldPooling": "hopfield_pooling", "HopfieldLayer": "hopfield_layer"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    config = {**case.config}
    model = tersor.models.load(SYSTEMS[config.pop("cls")], case.state_dict(), **config)
    # The published packed bias has rows for the projection even where that is static, which nothing uses.
    static, bias = config.get("pattern_projection_as_static", False), config.get("input_bias", True)
    projected = not (config.get("stored_pattern_as_static") and config.get("state_pattern_as_static"))
    if static and bias and projected:
        core = next(each for each in model.modules() if isinstance(each, HopfieldCore))
        case.parameters -= core.config.num_heads * (core.config.pattern_size or core.config.head_size)
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
