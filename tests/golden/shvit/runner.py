from golden.harness import Case, run_model
from torch import Tensor


def run(case: Case) -> dict[str, Tensor]:
    return run_model(case, "shvit", outputs={"stage1": "blocks1", "stage2": "blocks2", "stage3": "blocks3"})
