from golden.harness import Case, run_model
from torch import Tensor

from tersor.models.vision.sret import soft_cross_entropy

WITHOUT_EFFECT = ("patch_size", "stride")


def run(case: Case) -> dict[str, Tensor]:
    if "loss" in case.outputs:
        return {"loss": soft_cross_entropy(**case.inputs()).reshape(1)}
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    stages = {f"stage{n}": f"transformers.{n - 1}" for n in (1, 2, 3)}
    return run_model(case, "sret", config=config, outputs=stages)
