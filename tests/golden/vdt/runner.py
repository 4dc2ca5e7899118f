import torch
from golden.harness import Case, capture
from torch import Tensor

import tersor.models
from tersor.data.video_masks import VideoMasks
from tersor.train.diffusion import DiffusionConfig, GaussianDiffusion


def run(case: Case) -> dict[str, Tensor]:
    if "input_size" in case.config and isinstance(case.config["input_size"], list):
        return masks(case)
    if "diffusion" not in case.config:
        where = {name: f"blocks.{name[5:]}" if name.startswith("block") else "" for name in case.outputs}
        results = capture(load(case, case.config), sorted(set(where.values())), case.inputs())
        return {name: results[path] for name, path in where.items()}
    model = load(case, case.config["model"])
    diffusion = GaussianDiffusion(DiffusionConfig(**case.config["diffusion"]))
    inputs = case.inputs()
    return train_loss(model, diffusion, inputs) if "loss" in case.outputs else sample(model, diffusion, inputs)


def load(case: Case, published: dict[str, object]) -> torch.nn.Module:
    frames = {} if published.get("mode", "video") == "video" else {"num_frames": 1}  # which it sets by itself
    model = tersor.models.load("vdt", case.state_dict(), **{**published, **frames})
    tables = (*model.parameters(), *model.buffers())  # the fixed tables are frozen parameters there
    assert sum(tensor.numel() for tensor in tables) == case.parameters
    return model


def train_loss(model: torch.nn.Module, diffusion: GaussianDiffusion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    noise = inputs["noise"].transpose(1, 2)  # (B, C, T, H, W), while x0 is (B, T, C, H, W)
    terms = diffusion.losses(model, inputs["x0"], inputs["t"], noise=noise, mask=inputs.get("mask"))
    terms.loss.mean().backward()
    norms = {"final": "final_layer.linear.weight", "temporal": "blocks.0.temporal_attn.qkv.weight"}
    gradients = {f"grad_norm_{name}": model.get_parameter(key).grad.norm()[None] for name, key in norms.items()}
    return {"loss": terms.loss, "mse": terms.mse, "vb": terms.vb, **gradients}


def sample(model: torch.nn.Module, diffusion: GaussianDiffusion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    noises = (inputs[f"step_noise_{step}"].transpose(1, 2) for step in range(diffusion.steps))
    x = diffusion.sample(
        model, inputs["z"].transpose(1, 2), given=inputs.get("x0"), mask=inputs.get("mask"), noise=noises
    )
    return {"sample": x.transpose(1, 2), "timestep_map": diffusion.timestep_map, "betas": diffusion.betas}


def masks(case: Case) -> dict[str, Tensor]:
    frames, height, width = case.config["input_size"]
    drawer = VideoMasks(
        frames=frames,
        height=height,
        width=width,
        predict_given=case.config.get("predict_given_frame_length", 8),
        backward_given=case.config.get("backward_given_frame_length", 8),
        interpolation_step=case.config.get("interpreation_step", 4),
    )
    return {kind: drawer.draw(kind) for kind in case.outputs}
