"""One job in several processes, started by the real torchrun, on gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import files_of
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ
from tersor.methods.solved_apart import assign

SCRIPT = Path(__file__).with_name("shared_quantize.py")


def torchrun(processes: int, *command: str) -> subprocess.Popen[str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    return subprocess.Popen(
        launch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A job that a shell started in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and the lines that tersor itself wrote to standard error."""
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, [line for line in errors.splitlines() if line.startswith(("tersor:", "interr"))]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each process under torchrun has: with another number, matmuls round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(model: Path, out: Path) -> list[str]:
    return [str(model), "--out", str(out), "--group-size", "32", "--json"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    tersor.compress(
        "demo", GPTQ(), samples=3, seq_len=64, include=["model.layers.[01].*"], out=tmp_path / "one", seed=7
    )
    command = ["-m", "tersor", "quantize", "demo", "--samples", "3", "--seq-len", "64", "--seed", "7", "--json"]
    command += ["--include", "model.layers.[01].*", "--out", str(tmp_path / "two")]
    status, output, errors = finish(torchrun(2, *command))
    assert (status, errors) == (0, [])
    assert len(output.splitlines()) == 1  # only one process speaks
    assert len(json.loads(output)["layers"]) == 14
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_four_processes_with_three_samples_share_the_experts_of_a_mixture(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    method, batches = GPTQ(group_size=32), samples("mixtral", 3)
    tersor.compress(tmp_path / "model", method, calibration=batches, out=tmp_path / "one")
    out = tmp_path / "four"
    status, _, errors = finish(torchrun(4, str(SCRIPT), "mixtral", "3", "none", *arguments(tmp_path / "model", out)))
    assert (status, errors) == (0, [])
    assert files_of(out) == files_of(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_pack_the_embedding_and_the_head_too(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    method, batches = GPTQ(group_size=32), samples("llama", 4)
    asked = {"format": "compressed-tensors", "head": True, "embeddings": True}
    one = tersor.compress(tmp_path / "model", method, calibration=batches, out=tmp_path / "one", **asked)
    assert {layer.name for layer in one.summary.layers} >= {"model.embed_tokens", "lm_head"}
    run = [*arguments(tmp_path / "model", tmp_path / "two"), "--format", "compressed-tensors", "--head", "--embeddings"]
    status, _, errors = finish(torchrun(2, str(SCRIPT), "llama", "4", "none", *run))
    assert (status, errors) == (0, [])
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_process_ends_all_and_the_job_goes_on_later(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    out = tmp_path / "two"
    run = arguments(tmp_path / "model", out)
    status, _, errors = finish(torchrun(2, str(SCRIPT), "llama", "4", "kill", *run))
    assert status != 0
    assert len(errors) <= 1  # torchrun may end the others before they notice; it names the signal itself
    journal = json.loads((out / ".tersor-job" / "journal.json").read_text())
    assert list(journal["done"]) == ["model.layers.0"]

    status, output, errors = finish(torchrun(2, str(SCRIPT), "llama", "4", "none", *run))
    assert (status, errors) == (0, [])
    assert json.loads(output)["resumed_blocks"] == 1
    method, batches = GPTQ(group_size=32), samples("llama", 4)
    tersor.compress(tmp_path / "model", method, calibration=batches, out=tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


@pytest.mark.slow
def test_a_failing_process_ends_all_with_one_line(tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path / "model")
    run = arguments(tmp_path / "model", tmp_path / "out")
    status, _, errors = finish(torchrun(2, str(SCRIPT), "vit", "4", "nan", *run))
    assert status != 0
    assert len(errors) == 1
    assert "not finite" in errors[0]
    assert "calibration sample 1" in errors[0]  # its number among all samples


@pytest.mark.slow
def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    process = torchrun(2, str(SCRIPT), "llama", "4", "hang", *arguments(tmp_path / "model", tmp_path / "out"))
    assert process.stdout is not None
    for line in process.stdout:
        if "standing still" in line:
            break
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    status, _, errors = finish(process)
    assert status != 0
    assert len(errors) == 1
    assert time.monotonic() - started < 60


def test_costs_are_balanced() -> None:
    owner = assign({"q": 4, "k": 1, "v": 1, "gate": 11, "up": 11, "down": 27}, 2)
    assert {owner["gate"], owner["up"]} == {1 - owner["down"]}
    assert owner == assign({"q": 4, "k": 1, "v": 1, "gate": 11, "up": 11, "down": 27}, 2)
