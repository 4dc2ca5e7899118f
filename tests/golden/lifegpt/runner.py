import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.data.life import simulate
from tersor.models.text.lifegpt import training_loss


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "toroidal" in case.config:
        wrap, boards = case.config["toroidal"], case.inputs()
        generations = {name: case._outputs[name]["shape"][0] for name in case.outputs}
        return {name: simulate(boards[name].long(), count, wrap=wrap) for name, count in generations.items()}
    model = tersor.models.load("lifegpt", case.state_dict(), **case.config)
    check_parameters(case, model)
    ids = case.inputs()["tokens"]
    embeddings, _ = model.attn_layers(model.token_emb(ids), None, None)
    loss = training_loss(model, ids, forgetting=0).reshape(1)
    return {"logits": model(ids), "embeddings": embeddings, "loss": loss}
