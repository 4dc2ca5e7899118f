"""The walk by itself: what it gives out, and what it leaves behind when it is stopped or fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo.tiny_models import build, samples

from tersor import RTN
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.compress.driver import ToModule, compress_blocks
from tersor.compress.first_run import prepare
from tersor.compress.in_memory import InMemory
from tersor.compress.plan import make_plan
from tersor.compress.recipe import Recipe
from tersor.compress.settings import Job, job_of, settings_of
from tersor.compress.walk import Prepared, trace, units_of, walk
from tersor.methods.block import Block


def prepared() -> tuple[InMemory, Job, Prepared]:
    source = InMemory(build("llama").eval().requires_grad_(False))
    job = job_of(Recipe(RTN(group_size=32)), settings_of({"format": None}))
    batches = samples("llama", 2)
    return source, job, prepare(source, make_plan(source.module, job), job, batches, batches[0])


@torch.no_grad()
def test_every_block_is_given_out_once_and_the_probe_ends_as_the_compressed_model_computes_it() -> None:
    source, job, first = prepared()
    names = [block.name for block in walk(source, first, job, lambda block: False)]
    assert names == ["model.layers.0", "model.layers.1"]
    assert first.probe is not None
    assert first.probe.before is not None
    torch.testing.assert_close(first.probe.after, source.module(**first.probe.batch).logits, rtol=0, atol=0)
    assert not torch.equal(first.probe.before, first.probe.after)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_block_of_an_earlier_run_is_not_solved_again() -> None:
    source, job, first = prepared()
    blocks = list(walk(source, first, job, lambda block: block.name == "model.layers.0"))
    assert [bool(block.packed) for block in blocks] == [False, True]


@torch.no_grad()
def test_a_walk_that_is_stopped_leaves_a_model_that_runs() -> None:
    source, job, first = prepared()
    blocks = walk(source, first, job, lambda block: False)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert not any("forward" in vars(unit.module) for unit in units_of(source.module))
    assert source.module(**samples("llama", 1)[0]).logits.isfinite().all()


def test_a_sample_that_the_model_fails_on_is_told_in_its_own_words_and_leaves_no_weights(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    lazy = LazyModel(open_checkpoint(tmp_path), dtype=torch.float32)
    batch = {**samples("llama", 1)[0], "attention_mask": torch.ones(1, 1, 7, 7)}
    with pytest.raises(RuntimeError, match="size") as failed:
        trace(lazy, batch, lambda what, done, total: None)
    assert "meta" not in str(failed.value)
    outside = [unit.module for unit in units_of(lazy.module) if not unit.is_block]
    assert outside
    assert all(parameter.is_meta for module in outside for parameter in module.parameters())


class Failing(ToModule):
    def write(self, block: Block) -> None:
        raise OSError("no room")


def test_a_sink_that_fails_leaves_a_model_that_runs() -> None:
    source, job, _ = prepared()
    with pytest.raises(OSError, match="no room") as held:
        compress_blocks(source, Failing(source), replace(job, calibration=samples("llama", 2)))
    assert held.tb is not None  # whose frames hold the walk
    assert not any("forward" in vars(unit.module) for unit in units_of(source.module))
    assert source.module(**samples("llama", 1)[0]).logits.isfinite().all()
