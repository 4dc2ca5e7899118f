from golden.harness import Case, run_model
from torch import Tensor

WITHOUT_EFFECT = ("img_size", "num_stages", "use_checkpoint")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    return run_model(case, "smt", config=config, outputs={name: place(name) for name in case.outputs})


def place(output: str) -> str:
    """stage2 -> norm2; sam_block3_0 and mhsa_block3_1 -> block3.0.attn, block3.1.attn."""
    if output.startswith("stage"):
        return f"norm{output.removeprefix('stage')}"
    if "_block" in output:
        stage, block = output.partition("_block")[2].split("_")
        return f"block{stage}.{block}.attn"
    return ""
