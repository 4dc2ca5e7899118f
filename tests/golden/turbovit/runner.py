from golden.harness import Case, run_model
from torch import Tensor

PAIRS = ("img_size", "q_stride", "mask_unit_size", "patch_kernel", "patch_stride", "patch_padding")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: pair(value) if name in PAIRS else value for name, value in case.config.items()}
    config = {"embed_dim": 96, "stages": (2, 3, 16, 3), **config}  # the published defaults, where they are not ours
    where = {name: name.replace("block", "blocks.") for name in case.outputs if name.startswith("block")}
    return run_model(case, "turbovit", config=config, outputs=where)


def pair(value: int | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else value
