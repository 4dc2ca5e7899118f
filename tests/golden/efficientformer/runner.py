from golden.harness import Case, run_model
from torch import Tensor
from torch.nn import functional as F

from tersor.train.distillation import distillation_loss


def run(case: Case) -> dict[str, Tensor]:
    if case.name.startswith("distillation"):
        return run_losses(case)
    config = dict(case.config)
    system = config.pop("class").lower()
    if system == "efficientformerv2":
        for ignored in ("mlp_ratios", "pool_size"):  # arguments that the published V2 takes and does not use
            config.pop(ignored, None)
        if "e_ratios" in config:
            config["e_ratios"] = [config["e_ratios"][str(stage)] for stage in range(4)]
    stages = {name: name.replace("network_", "network.") for name in case.outputs if name.startswith("network_")}
    return run_model(case, system, config=config, outputs=stages)


def run_losses(case: Case) -> dict[str, Tensor]:
    student, distilled, teacher, labels = case.inputs().values()
    base = F.cross_entropy(student, labels, label_smoothing=0.1)
    losses = {"none": base}
    for kind in ("hard", "soft"):
        losses[kind] = distillation_loss(base, distilled, teacher, kind=kind, **case.config[kind])
    return {kind: loss.reshape(1) for kind, loss in losses.items()}
