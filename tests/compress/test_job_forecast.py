"""What a job says of its time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from torch.utils._pytree import tree_leaves
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN
from tersor.calibrate.batches import call
from tersor.calibrate.blocks import units_of
from tersor.calibrate.lockstep import Lockstep
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import Recipe, driver, forecast, from_options
from tersor.compress.forecast import Forecast, by_first_block
from tersor.compress.in_memory import InMemory
from tersor.compress.plan import make_plan
from tersor.compress.settings import job_of, settings_of
from tersor.compress.walk import Probe, trace
from tersor.layers.linear_map import linear_maps
from tersor.methods.method import BlockMethod
from tersor.progress import silent


def test_time_is_said_in_words_and_never_as_nothing() -> None:
    assert by_first_block(10.0, 30) == "by the first block: 5 min to go"
    assert by_first_block(2.0, 20) == "by the first block: 40 s to go"
    assert by_first_block(0.5, 20) is None
    assert Forecast(0.2, 10**9, 10**7).text() == "forecast: 1 s, 1.0 GB of memory, 0.01 GB of disk"


def test_a_job_tells_its_time_once_by_the_first_block_that_it_solves(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "WORTH_SAYING", -1)
    said: list[str] = []
    samples = [torch.arange(10, 74)[None] for _ in range(3)]
    tersor.compress(
        small_source,
        GPTQ(group_size=32),
        calibration=samples,
        out=tmp_path / "out",
        progress=lambda what, done, total: said.append(what) if total == 0 else None,
    )
    assert [each for each in said if re.fullmatch(r"by the first block: \d+ s to go", each)] == said[1:2]


def test_blocks_of_which_nothing_is_taken_are_not_counted(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(driver, "by_first_block", lambda seconds, left: counted.append(left))
    samples, method = [torch.arange(10, 74)[None]], GPTQ(group_size=32)
    tersor.compress(small_source, method, calibration=samples, out=tmp_path / "out", include=("*.layers.0.*",))
    assert counted == [0]


def first_pass(name: str, batch: dict[str, torch.Tensor]) -> tuple[InMemory, Probe]:
    source = InMemory(build(name).eval())
    with torch.no_grad():
        return source, trace(source, batch, silent)


def test_maps_of_one_input_are_one_group_and_a_pass_ends_where_a_group_has_its_input() -> None:
    source, probe = first_pass("llama", samples("llama", 1)[0])
    linears = {name: each for name, each in linear_maps(source.module).items() if name.startswith("model.layers.0.")}
    groups = forecast.groups_of(linears, probe.cost.inputs["model.layers.0"])
    names = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    sizes = {name: each.weight.numel() for name, each in linears.items()}
    before = [sum(sizes[name] for group in groups[:n] for name in group) for n in range(4)]
    assert forecast.passes_of(groups, linears) == pytest.approx(sum(before) / sum(sizes.values()))
    unseen = forecast.groups_of(linears, [])
    assert unseen == [[name] for name in linears]
    assert forecast.passes_of([], {}) == 0


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_waiting_memory_is_what_the_samples_hold_in_front_of_a_block(name: str) -> None:
    probe_batch = {"input_ids": torch.arange(4, 44).reshape(2, 20)}
    source, probe = first_pass(name, probe_batch)
    batches = [{"input_ids": torch.arange(4, 4 + length)[None]} for length in (37, 50, 11)]
    said = forecast.waiting_memory(probe.cost.arguments, (2, 20), [(1, 37), (1, 50), (1, 11)])
    units = units_of(source.module)
    with torch.no_grad(), Lockstep(source.module, units, batches, lambda each: call(source.module, each)) as passes:
        for stop in passes:
            if stop.unit.is_block and len(stop.calls) == len(batches):
                held = [x for x in tree_leaves([(c.args, c.kwargs) for c in stop.calls]) if isinstance(x, torch.Tensor)]
                break
            stop.run()
    hidden = sum(c.args[0].nbytes if c.args else c.kwargs["hidden_states"].nbytes for c in stop.calls)
    assert said == sum(each.nbytes for each in held) + hidden  # what comes out beside what went in


def test_every_method_by_blocks_can_be_rehearsed_and_leaves_the_random_numbers_alone() -> None:
    for method in (GPTQ(group_size=32), GPTQ(group_size=-1, weighted=True), RTN(bits=3), from_options("wanda", {})):
        assert isinstance(method, BlockMethod)
        torch.manual_seed(3)
        column, number = forecast.rehearsal(method, torch.device("cpu"), torch.float32, None)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
        assert column >= 0
        assert number >= 0
        assert column + number > 0


def test_a_layer_takes_its_columns_its_numbers_and_beyond_the_rehearsal_the_products() -> None:
    assert forecast.solving_time(10, 100, (0.5, 0.01), products=1e6) == pytest.approx(100 * (0.5 + 10 * 0.01))
    wide = forecast.REHEARSED + 44
    assert forecast.solving_time(10, wide, (0.5, 0.0), products=1e6) == pytest.approx(
        wide * 0.5 + 44 * wide * (10 + wide) / 1e6
    )
    assert forecast.solving_time(10, wide, (0.0, 0.0), products=1e6) == 0


def test_the_memory_said_is_near_the_peak_and_the_disk_holds_the_result(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = tersor_command(
        *("quantize", small_source, "--out", out, "--group-size", 32, "--samples", 16, "--seq-len", 256)
    )
    assert ran.status == 0, ran.err
    found = re.search(r"forecast: \d+ s, ([\d.]+) GB of memory, ([\d.]+) GB of disk", ran.err)
    assert found is not None, ran.err
    assert 0.7 < float(found[1]) / (json.loads((out / "tersor-run.json").read_text())["peak_memory"] / 1e9) < 1.4
    lazy = LazyModel(open_checkpoint(small_source), dtype=torch.float32)
    plan = make_plan(lazy.module, job_of(Recipe(GPTQ(group_size=32)), settings_of({})))
    written = (out / "model.safetensors").stat().st_size
    assert forecast.size_of_result(lazy, plan) == pytest.approx(written, rel=0.05)


def test_solving_holds_copies_of_the_largest_layer() -> None:
    source = InMemory(build("llama"))
    plan = make_plan(source.module, job_of(Recipe(GPTQ(group_size=32)), settings_of({})))
    shapes = [each.weight.shape for each in plan.all_linears().values()]
    most = max(columns**2 + rows * columns for rows, columns in shapes)
    assert forecast.solving_memory(plan) == 4 * forecast.SOLVER_COPIES * most


def test_outputs_are_held_three_times_and_a_row_of_them_in_float64() -> None:
    outputs = torch.zeros(4, 10, 7)
    assert forecast.comparing_memory(outputs) == 2 * 4 * 280 + 5 * 8 * 70
    assert forecast.comparing_memory(None) == 0
