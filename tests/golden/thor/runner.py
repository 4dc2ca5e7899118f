import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.text.thor import consistency, smoothed_cross_entropy, training_loss


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    model = tersor.models.load("thor", case.state_dict(), **case.config)
    check_parameters(case, model)
    inputs = case.inputs()
    source, previous, target = inputs["src"], inputs["prev"], inputs["target"]
    routes = [inputs[name] for name in sorted(inputs, key=lambda name: (len(name), name)) if name.startswith("route")]
    results = {"logits_routed": model(source, previous, routes)}
    results["encoder_out"] = model.encode(source, routes)[0].transpose(0, 1)
    model.train()
    runs = [model(source, previous, expert) for expert in (0, 1)]
    for expert, logits in enumerate(runs):
        loss, nll = smoothed_cross_entropy(logits, target)
        results |= {f"logits_expert{expert}": logits, f"loss_expert{expert}": loss, f"nll_expert{expert}": nll}
    results["consistency"] = consistency(*runs, target)
    results["total"] = training_loss(model, source, previous, target, experts=(0, 1))["loss"]
    return {name: results[name].reshape(1) if results[name].dim() == 0 else results[name] for name in case.outputs}
