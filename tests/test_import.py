"""`import tersor` is instant and leaves the process as it was; what is heavy comes with first use."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("package", ["torch", "transformers", "numpy", "typer", "rich"])
def test_import_leaves_heavy_packages_out(package: str) -> None:
    assert python(f"import sys, tersor; print({package!r} in sys.modules)").strip() == "False"


def test_import_takes_less_than_a_second() -> None:
    # Processor time: a busy machine is no reason to fail.
    took = python("import time; start = time.process_time(); import tersor; print(time.process_time() - start)")
    assert float(took) < 1


def test_import_prints_nothing_and_changes_nothing_global() -> None:
    code = """
import logging, os, signal, sys, threading, warnings
def state():
    return (dict(os.environ), os.getcwd(), list(sys.path), sys.excepthook, sys.displayhook, list(warnings.filters),
            logging.getLogger().level, list(logging.getLogger().handlers), threading.active_count(),
            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)])
before = state()
import tersor
assert state() == before
"""
    assert python(code) == ""


def test_every_public_name_is_there() -> None:
    import tersor

    for name in tersor.__all__:
        assert getattr(tersor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        tersor.quantise  # noqa: B018
