"""Structural pruning of a ViT: the zeroed model, the dense one, the table and the target agree."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tersor
import tersor.models
from tersor.errors import TersorError
from tersor.methods.structure import nvit_saliency as units
from tersor.methods.structure.nvit import NViTPruning, dense, full_width
from tersor.methods.structure.nvit_latency import FULL_BLOCK, LatencyTable, grid_of, measure_table, read_table
from tersor.models.vision.nvit import NViTConfig

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 5}


def small_vit(**other: Any) -> Any:
    torch.manual_seed(0)
    model = tersor.models.create("vit", **{**SMALL, **other}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def samples(count: int = 16, *, labels: bool = True) -> list[dict[str, Tensor]]:
    given = [{"image": image[None]} for image in images(count)]
    return [{**each, "target": torch.tensor([n % 5])} for n, each in enumerate(given)] if labels else given


def work_table() -> LatencyTable:
    """Time in proportion to the products of a block."""
    grid = ((16, 32, 64), (1, 2, 4), (1, 8, 16), (1, 8, 16), (1, 64, 128, 256))
    values = [e * (2 * h * q + 2 * h * v + 2 * m) + 17 * h * (q + v) for e, h, q, v, m in itertools.product(*grid)]
    seconds = torch.tensor(values, dtype=torch.float64).view([len(points) for points in grid])
    return LatencyTable(grid, seconds * FULL_BLOCK / seconds.max())


@pytest.fixture
def table(tmp_path: Path) -> str:
    work_table().save(tmp_path / "table.json")
    return str(tmp_path / "table.json")


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_an_unpruned_model_is_the_vit(distilled: bool) -> None:
    vit = small_vit(distilled=distilled)
    student = full_width(vit)
    torch.testing.assert_close(student(images()), vit(images()), rtol=1e-5, atol=1e-5)
    again: Any = dense(student, units.open_gates(student))
    assert again.operations() == student.operations()
    torch.testing.assert_close(again(images()), vit(images()), rtol=1e-5, atol=1e-5)


def random_gates(student: Any, seed: int) -> units.Gates:
    chance = torch.Generator().manual_seed(seed)
    gates = units.open_gates(student)
    for gate in gates:
        gate[:] = torch.rand(len(gate), generator=chance) < torch.rand((), generator=chance)
        gate[int(torch.randint(len(gate), (), generator=chance))] = True
    return gates


@torch.no_grad()
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.booleans())
def test_the_dense_model_computes_what_the_zeroed_one_does(seed: int, distilled: bool) -> None:
    student = full_width(small_vit(distilled=distilled)).double()
    gates = random_gates(student, seed)
    units.zero_pruned(student, gates)
    pruned: Any = dense(student, gates).double()
    assert [[pruned.config.embed_dim, *each] for each in zip(
        pruned.config.heads, pruned.config.qk, pruned.config.v, pruned.config.mlp, strict=True
    )] == units.widths_of(gates)  # fmt: skip
    torch.testing.assert_close(pruned(images().double()), student(images().double()), rtol=1e-4, atol=1e-4)


def test_a_criterion_is_the_squared_change_of_the_loss_to_first_order() -> None:
    student = full_width(small_vit()).double()

    def loss() -> Tensor:
        value: Tensor = torch.nn.functional.cross_entropy(student(images().double()), torch.tensor([0, 1, 2, 3]))
        return value

    loss().backward()
    criteria = units.criteria_of(student)
    before, step = loss().item(), 1e-5
    unit = 7
    with torch.no_grad():  # make a hidden unit of the second block smaller by a millionth
        for parameter in (student.blocks[1].mlp.fc1.weight, student.blocks[1].mlp.fc1.bias):
            parameter[unit] *= 1 - step
    change = (loss().item() - before) / step
    assert float(criteria[units.KINDS.index("mlp") + 4][unit]) == pytest.approx(change**2, rel=1e-3)


@pytest.mark.parametrize("labels", [True, False])
def test_pruning_reaches_the_target_and_is_saved(table: str, tmp_path: Path, labels: bool) -> None:
    vit = small_vit()
    method = NViTPruning(latency_target=0.6, latency_table=table, prune_per_step=32, batch_size=8, finetune_steps=2)
    said: list[str] = []
    result = tersor.compress(
        vit,
        method,
        calibration=samples(labels=labels),
        format=None,
        progress=lambda what, done, total: said.append(what) if total == 0 else None,
    )
    assert [line.split(":")[0] for line in said] == ["forecast", "latency by the table", "latency measured on 8 images"]
    share = int(re.findall(r"(\d+)% of the original's, 60% was asked", said[1])[0])
    pruned: Any = result.model
    rows = [list(report.row().values())[1:] for report in result.summary.layers]
    full = 3 * FULL_BLOCK
    assert 0.3 < sum(work_table().at(widths) for widths in rows) / full <= 0.6
    assert share == round(100 * sum(work_table().at(widths) for widths in rows) / full)
    assert rows == [[pruned.config.embed_dim, *each] for each in zip(
        pruned.config.heads, pruned.config.qk, pruned.config.v, pruned.config.mlp, strict=True
    )]  # fmt: skip
    assert result.summary.parameters_after < result.summary.parameters_before  # type: ignore[operator]
    assert pruned.operations() < full_width(vit).operations()
    result.save(tmp_path / "pruned")
    again: Any = tersor.load(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(images()), pruned(images()))


@pytest.mark.parametrize("target", [0.8, 0.42])  # the second leaves hardly any hidden unit
def test_fixed_kinds_keep_their_widths(table: str, target: float) -> None:
    method = NViTPruning(
        latency_target=target, latency_table=table, prune_per_step=32, batch_size=8, fixed="emb,head,qk,v"
    )
    config = tersor.compress(small_vit(), method, calibration=samples(), format=None).model.config  # type: ignore[union-attr]
    assert (config.embed_dim, config.heads, config.qk, config.v) == (64, (4,) * 3, (16,) * 3, (16,) * 3)
    assert sum(config.mlp) < 3 * 256


def test_fine_tuning_lowers_the_loss(table: str) -> None:
    def divergence(steps: int) -> float:
        method = NViTPruning(
            latency_target=0.7, latency_table=table, prune_per_step=64, batch_size=16, finetune_steps=steps, lr=1e-3
        )
        vit = small_vit()
        with torch.no_grad():
            labels = vit(images(16)).argmax(-1)
        given = [{"image": image[None], "target": label[None]} for image, label in zip(images(16), labels, strict=True)]
        pruned: Any = tersor.compress(vit, method, calibration=given, format=None).model
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(pruned(images(16)), labels))

    assert divergence(40) < divergence(0)


@torch.no_grad()
def test_deit_with_fused_projections_loads_by_its_published_names() -> None:
    vit = small_vit(distilled=True)
    model = tersor.models.load(
        "nvit", vit.state_dict() | {f"blocks.{n}.attn.qkv.token_mask": torch.ones(18, 1) for n in range(3)},
        img_size=16, patch_size=4, num_classes=5, embed_dim=64, heads=(4,) * 3, qk=(16,) * 3, v=(16,) * 3,
        mlp=(256,) * 3, head_dim=16,
    )  # fmt: skip
    torch.testing.assert_close(model(images()), vit(images()), rtol=1e-5, atol=1e-5)


def test_the_table_interpolates_and_keeps_to_its_ends(table: str) -> None:
    read = read_table(table)
    assert read.at([64, 4, 16, 16, 256]) == pytest.approx(FULL_BLOCK)
    ends = [read.at([64, 4, 16, 16, width]) for width in (128, 192, 256, 4096)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2)
    assert ends[3] == ends[2]
    assert read.at([40, 3, 12, 4, 96]) < read.at([48, 3, 12, 4, 96])


def test_a_measured_table_covers_the_full_block() -> None:
    seen: list[int] = []
    config = NViTConfig(
        img_size=16,
        patch_size=4,
        num_classes=10,
        embed_dim=64,
        heads=(2,),
        qk=(16,),
        v=(16,),
        mlp=(128,),
        token_mask=False,
    )
    full = (64, 2, 16, 16, 128)
    measured = measure_table(config, torch.device("cpu"), lambda what, done, total: seen.append(total - done), turns=1)
    assert seen == list(range(len(seen) - 1, -1, -1))
    assert measured.grid == grid_of(full)
    assert measured.at(full) == pytest.approx(FULL_BLOCK)
    assert float(measured.seconds.min()) > 0
    assert measured.outside is not None
    assert measured.beside_blocks(64) == float(measured.outside[-1]) > 0


def test_what_lies_outside_the_blocks_counts(table: str, tmp_path: Path) -> None:
    inside = read_table(table)
    widths = len(inside.grid[0])
    both = replace(inside, outside=torch.linspace(1, 2, widths, dtype=torch.float64))
    both.save(tmp_path / "both.json")
    read = read_table(tmp_path / "both.json")
    gates = units.open_gates(full_width(small_vit()))
    width = int(gates[0].sum())
    assert read.beside_blocks(width) > 0
    assert units.latency(gates, read) == pytest.approx(units.latency(gates, inside) + read.beside_blocks(width))
    with pytest.raises(TersorError, match="times outside the blocks"):
        replace(inside, outside=torch.ones(widths + 1))


def test_what_cannot_be_done_is_refused(table: str, tmp_path: Path) -> None:
    def refused(match: str, model: Any = None, calibration: Any = None, **options: Any) -> None:
        def attempt() -> None:
            method = NViTPruning(**{"latency_table": table, **options})
            tersor.compress(model or small_vit(), method, calibration=calibration or samples(), format=None)

        with pytest.raises(tersor.TersorError, match=match):
            attempt()

    refused("Sequential is no ViT", torch.nn.Sequential(torch.nn.Linear(2, 2)), [torch.randn(1, 2)])
    refused("latency_target=1.5 is not allowed", latency_target=1.5)
    refused(r"latency_target=0.01 is out of reach: .* takes 0\.\d\d", latency_target=0.01)
    refused(r"fixed='emb,mlps' is not allowed", fixed="emb,mlps")
    refused(r"fixed=.* is not allowed", fixed="emb,head,qk,v,mlp")
    refused("there is no|is no latency table", latency_table=str(tmp_path / "absent.json"))
    refused("the calibration is empty", calibration=iter(()))
    with pytest.raises(tersor.TersorError, match="none can be left out"):
        tersor.compress(
            small_vit(), NViTPruning(latency_table=table), calibration=samples(), exclude=["*fc1"], format=None
        )
    with pytest.raises(tersor.TersorError, match="heads for 2"):
        tersor.models.create("nvit", heads=(1, 1))
