"""What a job says of its time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tersor
from tersor import GPTQ
from tersor.compress import forecast
from tersor.compress.forecast import Forecast, by_first_block


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
