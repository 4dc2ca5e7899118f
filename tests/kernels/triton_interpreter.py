"""Run code under Triton's interpreter: on the CPU, in a process of its own: the choice is made at import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run_interpreted(code: str) -> None:
    """Skips where triton is not installed; fails with the piece's own output where it fails."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    code = "import torch\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
