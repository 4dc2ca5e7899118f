from golden.harness import Case, run_model
from torch import Tensor


def run(case: Case) -> dict[str, Tensor]:
    config = {**case.config}
    stages = {f"stage{i}": f"stages.{i}" for i in range(5)}
    return run_model(case, config.pop("variant"), config=config, outputs=stages)
