"""Shapes out of noise: the flow of TripoSG or the scales of G3PT, a decoder, marching cubes, a mesh file.

Training data are an .npz: for flows `latents` (N, M, C) and `context` (N, L, D), for next-scale models `tokens` (N, sum of
scales) and, as the model takes them, `label` (N,) and `context`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.data.arrays import load_arrays
from tersor.data.images import alpha_cut
from tersor.data.surfaces import FILES, check_cells, distance_grid, surface_of, write_mesh
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.progress import Progress
from tersor.tasks.task import Generator, Order, Sets, Task, numbers_of
from tersor.train.objectives import Batch
from tersor.train.rectified_flow import FlowConfig, RectifiedFlow
from tersor.untrusted import pretrained, read_json_object, read_npy

STEPS, GUIDANCE = 50, 7.0  # as published
RESOLUTION = 128  # cells a side
DROPPED = 0.1  # of the contexts, in training
ENCODER, EXTRACTOR = "image_encoder_dinov2", "feature_extractor_dinov2"  # folders of the published pipeline

NEXT_SCALE = "tokens"  # forward's argument by which a next-scale model is told from a flow


@dataclass(frozen=True)
class Shape:
    path: Path
    vertices: int
    faces: int
    volume: float

    def line(self) -> str:
        return f"{self.path}: {self.vertices:,} vertices, {self.faces:,} triangles, volume {self.volume:.4g}"

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "vertices": self.vertices, "faces": self.faces, "volume": self.volume}


# ---- training


def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of all scales' tokens, or the error of the flow's velocity at a drawn time."""
    if NEXT_SCALE in batch:
        logits = model(**batch)
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), batch[NEXT_SCALE].flatten())}

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        found: Tensor = model(hidden_states=x, timestep=t, encoder_hidden_states=context)
        return found

    dropped = DROPPED if model.training else 0.0
    flow = RectifiedFlow(FlowConfig())
    return {"loss": flow.loss(velocity, batch["hidden_states"], batch["encoder_hidden_states"], drop_context=dropped)}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if table:
        raise TersorError(f"an .npz of latents has no settings; leave data.{next(iter(table))} out")
    wanted = model.example_inputs(1)
    if NEXT_SCALE in wanted:
        if not bool(model.taken):
            raise TersorError(
                "this model has nothing of the tokenizer that made the tokens: model.take_quantizer(tokenizer) in Python, "
                "torch.save its state_dict, and give that file as --checkpoint"
            )
        names = {name: name for name in wanted}
    else:
        names = {"latents": "hidden_states", "context": "encoder_hidden_states"}
        if "encoder_hidden_states_2" in wanted:
            raise TersorError("`tersor train` has one context; RectifiedFlow.loss trains a triposg with two in Python")
    sets = [load_arrays(path, names) for path in (data, validation) if path is not None]
    for each in sets:
        _check_arrays(each[0], wanted, names)
    return Sets(sets[0], sets[1] if validation is not None else None)


def _check_arrays(item: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Their last side (or, of tokens, the only one) as the model takes it; a flow's sets may be of any size."""
    for stored, name in names.items():
        found, model_takes = item[name].shape, wanted[name].shape[1:]
        if len(found) != len(model_takes) or found[-1:] != model_takes[-1:]:
            raise TersorError(f"{stored} of one shape is {list(found)}, the model takes {list(model_takes)}")


# ---- sampling


@torch.no_grad()
def sample(generator: Generator, order: Order, progress: Progress) -> Shape:
    if generator.decoder is None:
        raise TersorError(
            f"{generator.folder} makes latents and nothing turns them into a shape; a folder with transformer/ (this model) and "
            "vae/ (its decoder) does"
        )
    cells = RESOLUTION if order.resolution is None else order.resolution
    check_cells(cells)
    next_scale = NEXT_SCALE in generator.module.example_inputs(1)
    field = (_by_scales if next_scale else _by_flow)(generator, order, progress)
    grid = distance_grid(field, cells=cells, progress=progress)
    mesh = surface_of(grid)
    with replacing(order.out) as partial:
        write_mesh(mesh, partial, kind=order.out.suffix.lower())
    return Shape(order.out, len(mesh.vertices), len(mesh.faces), mesh.volume())


def _by_flow(generator: Generator, order: Order, progress: Progress) -> Callable[[Tensor], Tensor]:
    module, decoder, like = generator.module, generator.decoder, numbers_of(generator.module)
    if order.prompt is not None:
        raise TersorError("this model takes no --prompt; --condition takes a picture, or an .npy with its context")
    if module.config.cross_attention_2_dim is not None:
        raise TersorError("this model has two contexts; RectifiedFlow.sample in Python takes both")
    if not hasattr(decoder.config, "latent_channels") or decoder.config.latent_channels != module.config.in_channels:
        raise TersorError(
            f"the model makes latents of {module.config.in_channels} numbers, which the decoder in {generator.folder} "
            "does not take"
        )
    context, guidance = torch.zeros(1, 1, module.config.cross_attention_dim), 1.0
    if order.condition is not None:
        context = _context(generator, order.condition, module.config.cross_attention_dim)
        guidance = GUIDANCE if order.guidance is None else order.guidance
    elif order.guidance is not None:
        raise TersorError("--guidance leads towards a --condition; give one, or leave --guidance out")
    context = context.to(like)

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        found: Tensor = module(hidden_states=x, timestep=t, encoder_hidden_states=context)
        return found

    chance = torch.Generator().manual_seed(order.seed)
    noise = torch.randn(1, decoder.config.num_tokens, module.config.in_channels, generator=chance).to(like)
    flow = RectifiedFlow(FlowConfig(shift=_shift(generator.folder)))
    latents = flow.sample(velocity, noise, context, steps=order.steps or STEPS, guidance=guidance, progress=progress)
    tokens = decoder.tokens(latents.to(numbers_of(decoder)))
    return lambda p: decoder.distances(tokens, p[None].to(tokens))[0, :, 0]


def _by_scales(generator: Generator, order: Order, progress: Progress) -> Callable[[Tensor], Tensor]:
    module, decoder, like = generator.module, generator.decoder, numbers_of(generator.module)
    config = module.config
    if order.steps is not None:
        raise TersorError(f"this model takes as many steps as it has scales, {len(config.scales)}; leave --steps out")
    if not bool(module.taken):
        raise TersorError(
            "this model has nothing of its tokenizer; model.take_quantizer(tokenizer) in Python, then train it"
        )
    if getattr(decoder.config, "scales", None) != config.scales or decoder.config.bits != config.bits:
        raise TersorError(f"the model's scales {config.scales} or bits {config.bits} are not those of the decoder")
    label = _label(order.prompt, config.num_classes)
    context = None
    if order.condition is not None:
        if config.context_dim is None:
            raise TersorError("this model takes no --condition: its context_dim is None")
        context = _context(generator, order.condition, config.context_dim).to(like)
    elif config.context_dim is not None:
        raise TersorError("this model needs a --condition: a picture, or an .npy with its context")
    if order.guidance is not None and label is None and context is None:
        raise TersorError("--guidance leads towards a --prompt or --condition; give one, or leave --guidance out")
    tokens = module.generate(
        None if label is None else label.to(like.device),
        context,
        guidance=1.0 if order.guidance is None else order.guidance,
        generator=torch.Generator().manual_seed(order.seed),
    )
    progress("scales", len(config.scales), len(config.scales))
    z = decoder.tokens(decoder.features(tokens.to(numbers_of(decoder).device)))
    return lambda p: -decoder.distances(z, p[None].to(z))[0, :, 0]


def _label(prompt: str | None, classes: int) -> Tensor | None:
    if prompt is None:
        return None
    if not classes:
        raise TersorError("this model takes no --prompt: its num_classes is 0")
    if not prompt.isdecimal() or int(prompt) >= classes:
        raise TersorError(f"--prompt {prompt!r}: this model takes the number of a class, 0 to {classes - 1}")
    return torch.tensor([int(prompt)])


def _shift(folder: Path) -> float:
    file = folder / "scheduler" / "scheduler_config.json"
    shift = read_json_object(file).get("shift", 1.0) if file.is_file() else 1.0
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise TersorError(f"{file}: shift is a number, not {shift!r}")
    return float(shift)


def _context(generator: Generator, path: Path, d: int) -> Tensor:
    """(1, L, d) float32, of an .npy file or of a picture."""
    if path.suffix.lower() == ".npy":
        values = read_npy(path)
        if (
            values.dtype.kind not in "fiu"
            or values.ndim != 2
            or values.shape[1] != d
            or not len(values)
            or not np.isfinite(values.astype(np.float64)).all()
        ):
            raise TersorError(
                f"{path} holds {values.dtype} {list(values.shape)}, a context is (length, {d}) of finite numbers"
            )
        return torch.from_numpy(values.astype(np.float32))[None]
    encoder_folder, extractor = generator.folder / ENCODER, generator.folder / EXTRACTOR
    if not (encoder_folder.is_dir() and extractor.is_dir()):
        raise TersorError(
            f"{generator.folder} has no {ENCODER} and {EXTRACTOR} to see {path} with; give an .npy with the context (length, {d})"
        )
    from transformers import AutoImageProcessor, AutoModel

    picture = alpha_cut(path)
    encoder = pretrained(AutoModel, encoder_folder, "image encoder").eval()
    processor = pretrained(AutoImageProcessor, extractor, "image processor")
    seen = encoder(processor(images=picture, return_tensors="pt")["pixel_values"]).last_hidden_state
    if seen.shape[-1] != d:
        raise TersorError(f"{encoder_folder} gives {seen.shape[-1]} numbers a token, the model takes {d}")
    return torch.as_tensor(seen).float()


TASK = Task(objective, load_data, sample=sample, makes=frozenset(FILES))
