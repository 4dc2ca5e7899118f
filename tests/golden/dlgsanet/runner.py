from golden.harness import Case, run_model
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "sigmoid")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name != "input_resolution"}
    if config.get("activation", "relu") not in ACTIVATIONS:
        config["activation"] = "identity"  # as the published code takes an unknown name
    outputs = {"deep": "deep_feature_extraction", "image": ""}
    return run_model(case, "dlgsanet", config=config, inputs={"image": case.inputs()["x"]}, outputs=outputs)
