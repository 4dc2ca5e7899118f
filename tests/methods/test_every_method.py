"""What holds for every method. A new one needs an entry in CASES: a model that it takes, and options that are quick."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import Tensor, nn
from zoo.tiny_models import build, samples

import tersor
from tersor.calibrate.batches import call, first_tensor, without_target
from tersor.methods.method import BlockMethod, Method, PackedMethod, as_words, from_options, methods, option
from tersor.methods.structure.nvit_latency import LatencyTable

Batches = list[dict[str, Any]]


def text() -> tuple[nn.Module, Batches]:
    return build("llama").float(), samples("llama", 4)


def image() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = tersor.models.create("vit", **small).eval()
    return model, [{"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([n % 5, 1])} for n in range(3)]


def scanned() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    info = tersor.models.find("vim")
    model: Any = tersor.models.create("vim", **{**info.small, "prune_after": ()}).eval()
    return model, [model.example_inputs(2) for _ in range(2)]


def graph() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    info = tersor.models.find("graphgps")
    model: Any = tersor.models.create("graphgps", **info.small).eval()
    batches = [model.example_inputs(2) for _ in range(2)]
    return model, batches


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Batches]], dict[str, Any]]] = {
    "ats": (image, {"ats_blocks": "1-"}),
    "awq-scale": (text, {"group_size": 16}),
    "bct": (text, {}),
    "dopq-vit": (image, {}),
    "drop-blocks": (text, {"blocks": 1}),
    "dsformer": (text, {"epochs": 1}),
    "fusegpt": (text, {"blocks": 1, "epochs": 1, "lora_rank": 4}),
    "gptq": (text, {"group_size": 16}),
    "greenformers": (text, {"rank": 0.5}),
    "gtsp": (graph, {"tokens": 0.5, "epochs": 1}),
    "magnitude": (text, {}),
    "nvit": (image, {"latency_target": 0.9, "prune_interval": 1, "finetune_steps": 1}),
    "q-hyvit": (image, {"w_bits": 8, "a_bits": 8}),
    "repquant": (image, {}),
    "rounding": (text, {"epochs": 1}),
    "rtn": (text, {"group_size": 16}),
    "scales": (text, {"epochs": 1, "integers": True}),
    "smoothquant": (text, {}),
    "sparsegpt": (text, {"pattern": "2:4"}),
    "ssm-token-pruning": (scanned, {"prune_after": "1"}),
    "teacher-intervention": (text, {"steps": 2, "intervention_steps": 1}),
    "wanda": (text, {}),
}


@pytest.fixture(autouse=True, scope="module")
def latencies(tmp_path_factory: pytest.TempPathFactory) -> None:
    """NViT goes by a table of latencies, in proportion to a block's products; one that it measures depends on the day."""
    grid = ((16, 32), (1, 2), (1, 16), (1, 16), (1, 128))
    seconds = [e * (h * q + h * v + m) for e, h, q, v, m in itertools.product(*grid)]
    table = LatencyTable(grid, torch.tensor(seconds, dtype=torch.float64).view(2, 2, 2, 2, 2))
    file = tmp_path_factory.mktemp("latencies") / "table.json"
    table.save(file)
    CASES["nvit"][1]["latency_table"] = str(file)


def steps_to(name: str) -> list[Method]:
    """The method, after one that packs where it tunes what is packed."""
    method = from_options(name, CASES[name][1])
    return (
        [from_options("gptq", {"bits": 2, "group_size": 16}), method] if isinstance(method, PackedMethod) else [method]
    )


def compressed(name: str) -> tuple[Any, nn.Module, Batches]:
    model, batches = CASES[name][0]()
    return tersor.compress(model, steps_to(name), calibration=batches), model, batches


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found = first_tensor(call(model, without_target(batch)))
    assert found is not None
    return found


def test_every_method_has_a_case() -> None:
    assert set(CASES) == set(methods())


@pytest.mark.parametrize("name", list(CASES))
def test_its_options_are_a_command_and_come_back_from_plain_values(
    name: str, tersor_command: Callable[..., Ran]
) -> None:
    method = from_options(name, CASES[name][1])
    plain = method.options()
    assert from_options(plain.pop("name"), plain) == method
    ran = tersor_command("compress", name, "--help")
    assert ran.status == 0
    shown = "".join(ran.out.split())
    for each in dataclasses.fields(method):
        flag = (each.metadata.get("flag") or f"--{each.name.replace('_', '-')}").partition("/")[0]
        assert flag[:20] in shown
        if isinstance(each.default, bool):
            (other,) = as_words(each, not each.default)
            assert other[:20] in shown
    assert ("--format" in ran.out) == isinstance(method, BlockMethod)
    assert ("--original" in ran.out) == isinstance(method, PackedMethod)


def test_a_switch_with_one_flag_is_off_when_it_is_not_given() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        quick: bool = option(False, "", flag="--quick")
        sym: bool = option(True, "", flag="--sym/--asym")
        exact: bool = option(True, "")
        names: tuple[str, ...] = option((), "")

    quick, sym, exact, names = dataclasses.fields(Options)
    assert (as_words(quick, False), as_words(quick, True)) == ([], ["--quick"])
    assert (as_words(sym, True), as_words(sym, False)) == ([], ["--asym"])
    assert as_words(exact, False) == ["--no-exact"]
    assert as_words(names, ("a", "b c")) == ["--names", "a", "--names", "b c"]


@pytest.mark.parametrize("name", list(CASES))
def test_its_result_is_saved_and_loaded_equal_and_leaves_the_original_alone(name: str, tmp_path: Path) -> None:
    model, batches = CASES[name][0]()
    before = copy.deepcopy(model.state_dict())
    result = tersor.compress(model, steps_to(name), calibration=batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    expected = output(result.model, batches[0])
    assert bool(torch.isfinite(expected).all())
    result.save(tmp_path / "saved")
    torch.testing.assert_close(output(tersor.load(tmp_path / "saved"), batches[0]), expected, rtol=1e-5, atol=1e-5)
    assert result.summary.layers


@pytest.mark.parametrize("name", list(CASES))
def test_the_same_job_gives_the_same_numbers(name: str) -> None:
    torch.manual_seed(1)
    first = compressed(name)[0].model.state_dict()
    torch.manual_seed(2)
    second = compressed(name)[0].model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
