"""What a job says of its loss: on which text, and with what interval."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran

import tersor
from tersor import GPTQ, RTN

SHOWN = r"on (512|2,048) tokens of the built-in evaluation text: KL divergence \d\.\d{4} ± \d\.\d{4} nats"


@pytest.mark.parametrize("verb", ["quantize --method rtn --group-size 32", "compress drop-blocks --blocks 1"])
def test_it_is_measured_on_held_out_text_with_an_interval_also_without_calibration(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path, verb: str
) -> None:
    name, *options = verb.split()
    first, rest = ([options[0]], options[1:]) if name == "compress" else ([], options)
    ran = tersor_command(name, *first, small_source, *rest, "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert re.search(SHOWN, " ".join(ran.out.split()))
    kept = json.loads((tmp_path / "out" / "tersor-run.json").read_text())
    assert len(kept["divergences"]) == 8
    assert kept["divergence"] == pytest.approx(sum(kept["divergences"]) / 8)


def test_no_more_text_than_a_quarter_of_the_samples(small_source: Path) -> None:
    how = {"calibration": "builtin", "samples": 4, "seq_len": 128}
    found = tersor.compress(small_source, GPTQ(group_size=32), **how).summary
    assert found.compared_on == "128 tokens of the built-in evaluation text"
    found = tersor.compress(small_source, GPTQ(group_size=32), **{**how, "samples": 1, "seq_len": 32}).summary
    assert found.compared_on == "64 tokens of the built-in evaluation text"


def test_samples_that_a_program_gives_are_compared_on_the_first_of_them(small_source: Path) -> None:
    samples = [{"input_ids": torch.arange(10, 90)[None]}, {"input_ids": torch.arange(50)[None]}]
    found = tersor.compress(small_source, RTN(group_size=32), calibration=samples)
    assert found.summary.compared_on == "the first sample"
    assert found.before is not None
    assert found.before.shape[:2] == (1, 64)
