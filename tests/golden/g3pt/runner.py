import math

from golden.harness import Case
from torch import Tensor

from tersor.layers.lookup_free import LFQ


def run(case: Case) -> dict[str, Tensor]:
    config, state = case.config, case.state_dict()
    lfq = LFQ(
        config["dim"],
        round(math.log2(config.get("codebook_size", 2 ** config["dim"]))),
        gamma=config.get("diversity_gamma", 1.0),
        inv_temperature=config.get("inv_temperature", 100.0),
    )
    lfq.load_state_dict(state)
    assert sum(p.numel() for p in lfq.parameters()) == case.parameters
    x = case.inputs()["x"].requires_grad_()
    quantized, indices = lfq(x)
    losses = lfq.losses(x)
    # the published defaults
    weights = {
        "entropy": config.get("entropy_loss_weight", 0.1),
        "commitment": config.get("commitment_loss_weight", 0.0),
    }
    total = losses.total(**weights)
    (quantized.sum() + total).backward()
    assert x.grad is not None
    return {
        "quantized": quantized,
        "indices": indices,
        "aux_loss": total[None],
        "per_sample_entropy": losses.per_sample_entropy[None],
        "batch_entropy": losses.batch_entropy[None],
        "commitment": losses.commitment[None],
        "grad_input": x.grad,
    }
