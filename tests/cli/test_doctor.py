"""`tersor doctor` tells what is there, and what is missing and how to get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran

from tersor.evaluate.machine import EXTRAS, Gpu, Machine, advice, examine
from tersor.kernels import cpp
from tersor.kernels import quantized_matmul_cpu as cpu

ROOT = Path(__file__).parents[2]


def doctor(**environment: str) -> dict[str, Any]:
    source = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_what_a_process_of_its_own_finds() -> None:
    found = doctor()
    assert found["versions"]["torch"] is not None
    assert found["memory"] > found["memory_available"] > 2**20
    assert [each["bits"] for each in found["kernels"]] == [4, 8, 3, 2]
    for each in found["kernels"]:
        assert all(ms > 0 for ms in each["milliseconds"].values())
        assert set(each["speedup"]) == {"1", "64"} == set(found["dense"])
    try:
        path, _ = cpp.compiler()
    except cpp.CompileError:
        path = None
    if path is not None and not torch.cuda.is_available():
        assert found["compiler"].startswith(path)
        assert {each["implementation"] for each in found["kernels"]} == {f"compiled kernel, {cpu.choose()[0]}"}
        assert all(each["why_not"] is None for each in found["kernels"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="layers go to the GPU here")
def test_without_a_compiler_it_says_what_is_lost_and_how_to_get_one() -> None:
    found = doctor(PATH="/nonexistent")
    assert found["compiler"] is None
    assert "no C++ compiler on the PATH" in found["compiler_missing"]
    assert not any(each["implementation"].startswith("compiled") for each in found["kernels"])
    assert all("no C++ compiler" in each["why_not"] for each in found["kernels"])
    assert all(each["speedup"]["1"] < 1 for each in found["kernels"])  # as the advice says
    assert "apt install g++" in found["advice"][0]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return examine()


def test_it_prints_facts_a_table_and_advice(tersor_command: Callable[..., Ran]) -> None:
    ran = tersor_command("doctor")
    assert ran.status == 0
    for words in ("processor", "memory", "compiler", "torch ", "F.linear", "1 row"):
        assert words in ran.out


def test_advice_names_what_is_missing_and_the_way_to_it(machine: Machine) -> None:
    whole = replace(
        machine,
        compiler="/usr/bin/c++: 12",
        compiler_missing=None,
        features={**machine.features, "AVX2": True},
        kernel_cache_writable=True,
        gpus=[Gpu("H100", 80 * 2**30, "9.0", kernel="wgmma")],
        extras=dict.fromkeys(EXTRAS, "1.0"),
    )
    assert advice(whole) == []
    lacking = {
        "no AVX2": replace(whole, features=dict.fromkeys(machine.features, False)),
        "compiled anew by every process": replace(whole, kernel_cache_writable=False),
        "no packed kernel for V100": replace(whole, gpus=[Gpu("V100", 32 * 2**30, "7.0", kernel=None)]),
        "no GPU": replace(whole, gpus=[]),
        "pip install 'tersor[gguf]'": replace(whole, extras={**whole.extras, "gguf": None}),
    }
    for words, each in lacking.items():
        assert len(advice(each)) == 1
        assert words in advice(each)[0]


def test_every_extra_for_users_is_known_with_its_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        extra: needs for extra, needs in project["optional-dependencies"].items() if extra not in ("docs", "dev")
    }
    assert declared.keys() == EXTRAS.keys()
    for extra, (package, _) in EXTRAS.items():
        assert any(need.startswith(package) for need in declared[extra]), extra
