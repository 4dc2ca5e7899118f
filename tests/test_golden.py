"""Every case under tests/golden/SYSTEM/ computes what the published implementation computed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden.harness import TOLERANCE, Case, run_model

FOLDER = Path(__file__).parent / "golden"
SLOW_ABOVE = 50_000_000  # parameters


def _cases() -> list[object]:
    cases = []
    for path in sorted(FOLDER.glob("*/*.json")):
        if not path.with_suffix(".npz").exists():
            continue
        slow = json.loads(path.read_text()).get("parameters", 0) > SLOW_ABOVE
        cases.append(pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=pytest.mark.slow if slow else ()))
    return cases


def _runner(folder: Path) -> ModuleType | None:
    path = folder / "runner.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"golden_runner_{folder.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", _cases())
def test_golden_case(path: Path) -> None:
    case, runner = Case(path), _runner(path.parent)
    assert runner or case.outputs, f"{path.name} names no outputs, so {path.parent.name}/runner.py must check it"
    torch.manual_seed(0)
    got = runner.run(case) if runner else run_model(case, path.parent.name.replace("-", "_"))
    got = {name: value for name, value in got.items() if name in case.outputs}  # a case may ask for fewer
    tolerances = getattr(runner, "TOLERANCE", {})
    for name, value in got.items():
        case.check(name, value, tolerances.get(name, TOLERANCE))
    missing = set(case.outputs) - case.compared
    assert not missing, f"not compared: {sorted(missing)}"
