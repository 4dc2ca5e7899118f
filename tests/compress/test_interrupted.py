"""A job that is stopped at any moment leaves what it has finished, and the same command goes on to the same bytes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Ran, Stopped, files_of

import tersor
from tersor import GPTQ

ARGUMENTS = ("--samples", "4", "--seq-len", "128", "--bits", "4", "--seed", "3")


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tersor", "quantize", "demo", "--out", str(out), *ARGUMENTS, *more]
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which shells take from what runs behind them
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)


def wait_for_block(process: subprocess.Popen[str], out: Path, number: int) -> None:
    """Until so many blocks are on disk. A process that ends before is left to the test."""
    while process.poll() is None and len(list((out / ".tersor-job").glob("model.layers.*.safetensors"))) < number:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    tersor.compress("demo", GPTQ(bits=4), out=out, samples=4, seq_len=128, seed=3)
    return files_of(out)


@pytest.mark.slow
def test_ctrl_c_keeps_finished_blocks_and_the_same_command_goes_on(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    process = start(out)
    wait_for_block(process, out, 2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert printed == ""
    forecast, few, *said = errors.strip().splitlines()
    assert few.startswith("512 calibration tokens")
    assert forecast.startswith("forecast:")
    assert said == ["interrupted: give the same command again, and it goes on from what is finished"]
    assert not (out / "config.json").exists()
    with pytest.raises(tersor.TersorError, match="unfinished job"):
        tersor.load(out)

    resumed = start(out)
    printed, errors = resumed.communicate(timeout=900)
    assert resumed.returncode == 0, errors
    assert "blocks from an earlier run" in printed
    assert files_of(out) == uninterrupted


@pytest.mark.slow
def test_a_job_killed_again_and_again_comes_to_the_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    for blocks, how in ((1, signal.SIGTERM), (4, signal.SIGKILL)):
        process = start(out, "--activations", "disk")
        wait_for_block(process, out, blocks)
        assert list(out.glob(".tersor-job/.tmp-activations-*/*.pt"))
        process.send_signal(how)
        _, errors = process.communicate()
        if how == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert errors.splitlines()[-1].startswith("interrupted: give the same command again")
            assert not list(out.glob(".tersor-job/.tmp*"))
    tersor.compress("demo", GPTQ(bits=4), out=out, samples=4, seq_len=128, seed=3)
    assert files_of(out) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_job_stopped_between_any_two_files_comes_to_the_same_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_left: list[int], sharded: bool
) -> None:
    if sharded:
        monkeypatch.setattr("tersor.checkpoint.writer.SINGLE_FILE_LIMIT", 1000)

    def run(out: Path) -> None:
        tersor.compress(small_source, GPTQ(group_size=32), out=out, samples=2, seq_len=32)

    run(tmp_path / "whole")
    files = 10**9 - files_left[0]
    for stop in range(int(sharded), files, 3):
        files_left[0] = stop
        with pytest.raises(Stopped):
            run(tmp_path / "out")
        files_left[0] = 10**9
        run(tmp_path / "out")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole"), f"stopped before file {stop} of {files}"
        shutil.rmtree(tmp_path / "out")


def test_another_command_does_not_go_on_with_it(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("tersor.checkpoint.writer.ResultWriter.place", stop)
        with pytest.raises(Stopped):
            tersor.compress(small_source, GPTQ(group_size=32), out=out, samples=2, seq_len=32)
    before = files_of(out)
    common = ("quantize", small_source, "--out", out, "--group-size", 32, "--seq-len", 32)
    for other, changed in (
        (("--samples", 2, "--bits", 3), "another bits"),
        (("--samples", 3), "another calibration"),
        (("--samples", 2, "--seed", 1), "another calibration"),
    ):
        ran = tersor_command(*common, *other)
        assert ran.status == 2
        assert changed in ran.err
    assert files_of(out) == before
    ran = tersor_command(*common, "--samples", 2, "--bits", 3, "--overwrite", "--json")
    assert ran.status == 0, ran.err


def test_a_file_size_limit_is_an_error_in_one_line(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path
) -> None:
    """What a quota does, and a stand-in for a full disk where none can be mounted."""
    out, command = tmp_path / "out", ("quantize", small_source, "--group-size", 32, "--samples", 2, "--seq-len", 32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        ran = tersor_command(*command, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ran.status == 2
    (_, _, said) = ran.err.splitlines()  # after the forecast and the note on few tokens
    assert "cannot write to" in said
    assert not (out / "config.json").exists()
    assert tersor_command(*command, "--out", out).status == 0  # with room, the same command finishes


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_an_error_in_one_line_and_the_job_goes_on_with_more_room(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        command = ("quantize", small_source, "--group-size", 32, "--samples", 2, "--seq-len", 32, "--out", disk / "out")
        ran = tersor_command(*command)
        assert ran.status == 2
        (_, _, said) = ran.err.splitlines()  # after the forecast and the note on few tokens
        assert "is full; make room and give the same command again" in said
        assert not (disk / "out" / "config.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        ran = tersor_command(*command, "--json")
        assert ran.status == 0, ran.err
        assert '"resumed_blocks": 2' in ran.out
    finally:
        subprocess.run(["umount", str(disk)], check=True)
