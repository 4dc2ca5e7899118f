"""The golden harness itself notices what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.harness import Case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    path = tmp_path / "tiny.json"
    described = {
        "name": "tiny",
        "config": {"width": 2},
        "parameters": 6,
        "notes": "",
        "weights": [
            {"key": "l.weight", "shape": [2, 3]},
            {"key": "l.scale", "shape": [2], "rule": {"mean": 1, "std": 0}},
        ],
        "input_specs": {"x": {"shape": [4], "kind": "int", "high": 3}},
        "outputs": {"y": {"shape": [2, 3], "step": 2}},
    }
    path.write_text(json.dumps(described))
    np.savez(path.with_suffix(".npz"), **{"output/y": np.array([0.0, 2.0, -4.0], np.float32)})
    return Case(path)


def test_weights_and_inputs_follow_from_their_names(case: Case) -> None:
    state = case.state_dict()
    assert torch.equal(state["l.weight"], case.state_dict()["l.weight"])
    assert torch.equal(state["l.scale"], torch.ones(2))
    assert case.inputs()["x"].dtype == torch.int64


def test_every_step_th_element_is_compared_relative_to_the_largest(case: Case) -> None:
    got = torch.tensor([[0.0, 9.0, 2.0], [9.0, -4.0, 9.0]])
    assert case.error("y", got) == 0
    got[1, 1] = -3.0
    assert case.error("y", got) == 0.25
    with pytest.raises(AssertionError, match=r"tiny: y is off by 0\.25"):
        case.check("y", got)


def test_wrong_shapes_and_nans_are_infinitely_wrong(case: Case) -> None:
    assert case.error("y", torch.zeros(3, 2)) == math.inf
    assert case.error("y", torch.full((2, 3), math.nan)) == math.inf
    assert not case.compared
    with pytest.raises(AssertionError, match="inf"):
        case.check("y", torch.zeros(3, 2))
    assert case.compared == {"y"}
