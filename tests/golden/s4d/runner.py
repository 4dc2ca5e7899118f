from golden.harness import Case, check_parameters, run_model
from golden.s4.runner import run_block
from torch import Tensor

from tersor.models.loading import load_state
from tersor.models.sequence.s4d import S4D


def run(case: Case) -> dict[str, Tensor]:
    if "mode" in case.config:
        return run_block(case)
    if "d_output" in case.config:
        return run_model(case, "s4d")
    layer = S4D(**case.config)
    load_state(layer, case.state_dict(), what=case.name)
    check_parameters(case, layer.eval())
    x = case.inputs()["x"]
    return {"y": layer(x), "kernel": layer.kernel(x.shape[-1] if layer.transposed else x.shape[1])}
