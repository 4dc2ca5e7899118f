"""What holds for every registered model; a new model file is picked up by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tersor
import tersor.models
from tersor.models import ModelInfo
from tersor.tasks import task_named, tasks
from tersor.train.config import TrainConfig
from tersor.train.trainer import optimizer_for

VARIANTS = tersor.models.list()
SYSTEMS = list({info.system: info for info in VARIANTS}.values())  # one variant of each class: it knows `small`


def each_system(test: Any) -> Any:
    return pytest.mark.parametrize("info", SYSTEMS, ids=lambda info: info.system)(test)


def build_small(info: ModelInfo) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create(info.system, **info.small)


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("info", VARIANTS, ids=lambda info: info.name)
def test_has_the_published_number_of_parameters(info: ModelInfo) -> None:
    with torch.device("meta"):  # no memory, no initialisation: a model of any size is counted in no time
        model = tersor.models.create(info.name)
    assert sum(p.numel() for p in model.parameters()) == info.parameters


@each_system
def test_runs_forward_and_backward_on_its_example(info: ModelInfo) -> None:
    model = build_small(info).train()
    results = tensors(model(**model.example_inputs(2)))
    assert results
    assert all(torch.isfinite(result).all() for result in results if result.is_floating_point())
    sum(result.float().square().mean() for result in results if result.requires_grad).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@each_system
def test_learns_by_its_own_task(info: ModelInfo) -> None:
    """The loss on one batch falls in a few steps of the trainer's optimizer."""
    if info.task not in tasks():
        pytest.skip(f"no objective for the task {info.task!r} yet")
    model, objective = build_small(info).train(), task_named(info.task).objective
    if info.task == "act" and not hasattr(model, "stream"):
        pytest.skip(f"{info.system} learns from recorded runs, not by acting")
    batch = model.example_inputs(4)
    with torch.no_grad():
        result = tensors(model(**batch))[0]
    if info.task == "classify":
        batch["target"] = torch.arange(len(result)) % result.shape[1]
    elif info.task == "forecast":
        batch["target"] = torch.ones_like(result)
    elif info.task == "restore":
        batch["target"] = torch.full_like(result, 0.5)
    elif info.task == "segment":
        batch["target"] = torch.zeros_like(result[:, 0], dtype=torch.int64)
    elif info.task == "reconstruct-3d":
        batch["target"] = torch.ones_like(result[:, 0])
    elif info.task == "encode-shape":
        batch["target"] = batch["query_points"].norm(dim=-1) - 0.8
    elif info.task == "graph-predict":
        batch["target"] = torch.ones_like(result)
    elif info.task == "node-classify":
        batch["target"] = torch.arange(len(result)) % result.shape[1]
    elif info.task == "link-predict":
        batch["target"] = torch.arange(len(result)) % 2.0
    elif info.task == "act":
        x = batch["x"]  # [T, B, ...]
        shape, width = x.shape[:2], result.shape[-1] - 1
        batch["actions"] = torch.arange(shape.numel()).view(shape) % width
        batch |= {"chosen": torch.full(shape, -math.log(width)), "advantages": torch.ones(shape)}
        batch |= {"wanted": torch.ones(shape), "real": torch.ones(shape, dtype=torch.bool)}
    elif info.task == "transcribe":
        batch |= {"text": torch.arange(3, 15).view(4, 3), "text_lengths": torch.full((4,), 3)}
    optimizer = optimizer_for(model, TrainConfig(lr=1e-3))
    losses = []
    for _ in range(8):
        torch.manual_seed(0)  # the same masks and dropped units each time
        loss = objective(model, batch)["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(losses[-2:]) < losses[0]


@each_system
def test_is_rebuilt_from_its_config_as_json(info: ModelInfo) -> None:
    model = build_small(info).eval()
    described = json.loads(json.dumps(tersor.models.config_of(model)))
    again = tersor.models.create(described.pop("tersor_model"), **described).eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    inputs = model.example_inputs(1)
    with torch.no_grad():
        assert_equal_results(again(**inputs), model(**inputs))


@each_system
def test_small_is_small(info: ModelInfo) -> None:
    assert sum(p.numel() for p in build_small(info).parameters()) <= 500_000


@each_system
def test_survives_export_unless_it_says_why_not(info: ModelInfo) -> None:
    model = build_small(info).eval()
    inputs = model.example_inputs(2)
    try:
        exported = torch.export.export(model, (), inputs).module()
    except Exception:
        if info.untraceable:
            pytest.xfail(info.untraceable)
        raise
    assert not info.untraceable, f"it does survive; take untraceable={info.untraceable!r} out of its @register"
    with torch.no_grad():
        assert_equal_results(exported(**inputs), model(**inputs))


@each_system
def test_is_quantized_saved_and_loaded_with_equal_outputs(info: ModelInfo, tmp_path: Path) -> None:
    model = build_small(info).eval()
    batches = [model.example_inputs(2) for _ in range(2)]
    method = tersor.GPTQ(bits=4, group_size=-1)
    result = tersor.compress(model, method, calibration=batches, format="compressed-tensors")
    assert result.summary.layers
    result.save(tmp_path / "quantized")
    again = tersor.load(tmp_path / "quantized")
    with torch.no_grad():
        original, quantized = tensors(model(**batches[0])), tensors(result.model(**batches[0]))
        assert_equal_results(again(**batches[0]), result.model(**batches[0]))
    assert any(not torch.equal(a, b) for a, b in zip(original, quantized, strict=True) if a.is_floating_point())


@pytest.fixture(scope="module")
def einops_as_operators() -> None:
    """einops' functions are one node each in a graph. Else Dynamo reads them line by line at every call, which takes most of
    the time of compiling, and says nothing of our models."""
    for each in (einops.rearrange, einops.reduce, einops.repeat, einops.einsum):
        torch.compiler.allow_in_graph(each)


@pytest.mark.slow
@pytest.mark.usefixtures("einops_as_operators")
@each_system
def test_compiles_in_one_graph_or_in_several_if_it_is_untraceable(info: ModelInfo) -> None:
    model = build_small(info).eval()
    inputs = model.example_inputs(2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=not info.untraceable)
    with torch.no_grad():
        assert_equal_results(compiled(**inputs), model(**inputs))


def assert_equal_results(got: Any, expected: Any) -> None:
    torch.testing.assert_close(tensors(got), tensors(expected), rtol=1e-4, atol=1e-5)
