import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.train.rectified_flow import FlowConfig, RectifiedFlow

FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting")


def run(case: Case) -> dict[str, Tensor]:
    if "latent_mean" in case.outputs:
        return vae(case)
    if "timesteps" in case.outputs:
        return scheduler(case)
    model = tersor.models.load("triposg", case.state_dict(), **case.config)
    check_parameters(case, model)
    middle = f"blocks.{model.config.num_layers // 2}"
    at = {name: middle if name == "mid_block" else "" for name in case.outputs}
    at |= {name: f"blocks.{name.removeprefix('block')}" for name in case.outputs if name.startswith("block")}
    results = capture(model, sorted(set(at.values())), case.inputs())
    return {name: results[path] for name, path in at.items()}


@torch.no_grad()
def vae(case: Case) -> dict[str, Tensor]:
    model = tersor.models.load("triposg_vae", case.state_dict(), **case.config)
    check_parameters(case, model)
    inputs = case.inputs()
    points = inputs["points"]
    tokens = case._outputs["latent_mean"]["shape"][1]  # the first points are the queries
    posterior = model.encode(points, rows=torch.arange(tokens).expand(len(points), -1))
    decoded = model.decode(posterior.mean, inputs["query_points"])
    return {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar, "decoded": decoded}


def scheduler(case: Case) -> dict[str, Tensor]:
    config, inputs = dict(case.config), case.inputs()
    flow = RectifiedFlow(FlowConfig(**{name: config[name] for name in FLOW if name in config}))
    steps, mu = config["num_inference_steps"], config.get("mu")
    outputs = (inputs[f"model_output_{step}"] for step in range(steps))
    final = flow.sample(lambda x, t, context: next(outputs), inputs["sample"], steps=steps, mu=mu)
    sigmas = flow.sigmas(steps, mu=mu)
    found = {"timesteps": flow.time(sigmas[:-1]), "sigmas": sigmas, "final": final}
    for name in case.outputs:
        if name.startswith("noised_at_"):
            time = torch.tensor(float(name.removeprefix("noised_at_")))
            found[name] = flow.add_noise(inputs["sample"], inputs["noise"], time)
    return {name: found[name] for name in case.outputs}
