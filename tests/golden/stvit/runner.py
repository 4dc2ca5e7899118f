from golden.harness import Case, capture
from torch import Tensor

import tersor.models

WITHOUT_EFFECT = ("freeze_bn", "use_checkpoint")
FIXED = 2 * 9 * 3 * 3  # one-hot kernels that every published block holds as parameters, and ours does not


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("stvit", case.state_dict(), **config)
    count = sum(p.numel() for p in model.parameters()) + FIXED * sum(model.config.depths)
    assert count == case.parameters
    where = {name: place(name) for name in case.outputs}
    results = capture(model, sorted(set(where.values())), case.inputs())
    return {name: results[path] for name, path in where.items()}


def place(output: str) -> str:
    """layer2 -> layers.2; sta_0_1 -> layers.0.blocks.1.attn."""
    if output.startswith("layer"):
        return f"layers.{output.removeprefix('layer')}"
    if output.startswith("sta_"):
        _, stage, block = output.split("_")
        return f"layers.{stage}.blocks.{block}.attn"
    return ""
