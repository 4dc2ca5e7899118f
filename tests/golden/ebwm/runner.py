from dataclasses import fields

from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.sequence.ebwm import EBWMConfig

OURS = {field.name for field in fields(EBWMConfig)}
NOT_HERE = {  # published options that we do not have, and the only value that a case may give them
    "randomize_mcmc_step_size_scale": 1,
    "randomize_mcmc_num_steps": 0,
    "randomize_mcmc_num_steps_final_landscape": False,
    "mcmc_replay_buffer": False,
    "energy_loss_coeff": 0.0,
    "out_of_bounds_loss_coeff": 0.0,
    "reconstruction_coeff": 1.0,
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
}


def run(case: Case) -> dict[str, Tensor]:
    for name, value in NOT_HERE.items():
        assert case.config.get(name, value) == value, f"{name} {case.config[name]} is not among our options"
    config = {name: value for name, value in case.config.items() if name in OURS}
    model = tersor.models.load("ebwm", case.state_dict(), **config).train()
    check_parameters(case, model)
    frames, noise = (case.inputs()[name] for name in ("frames", "noise"))
    losses = model.training_loss(frames, noise)
    losses["loss"].backward()
    guesses, energies = model.think(frames[:, :-1], noise, learn=True)
    results = {name: value.reshape(1) for name, value in losses.items()}
    results |= {"energy_step0": energies[0].flatten(0, 1), "energy_last": energies[-1].flatten(0, 1)}
    results |= {"pred_step0": guesses[0], "pred_last": guesses[-1]}
    for name in case.outputs:
        if name.startswith("gradnorm:"):
            gradient = model.get_parameter(name.removeprefix("gradnorm:")).grad
            assert gradient is not None
            results[name] = gradient.norm().reshape(1)
    return {name: results[name] for name in case.outputs}
