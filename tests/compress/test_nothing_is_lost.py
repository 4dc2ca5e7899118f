"""A job that is killed at any moment goes on when it is started again, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.checkpoint import writer
from tersor.checkpoint.room import RUN_FILE
from tersor.compress.result import Compressed

KILLS = 24
FOLDER = ".tersor-job"


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the record of times, which differ from run to run."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != RUN_FILE]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def check_whole(directory: Path) -> None:
    """Every file, but for the one that is being written, can be read to its end."""
    for path in directory.rglob("*"):
        if path.name == RUN_FILE:
            continue  # written when all is finished, and only told about
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.name == "tokenizer.txt":
            assert path.read_bytes() == b"words " * 10_000
        else:
            assert path.is_dir() or (path.parent.name == FOLDER and path.name.startswith(("partial", ".tmp")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(directory, max_shard_size="100KB")
    (directory / "tokenizer.txt").write_bytes(b"words " * 10_000)
    return directory


def quantize(model: Path, out: Path, *, seed: int = 1, sharded: bool = False, **options: Any) -> Compressed:
    options.setdefault("method", GPTQ(group_size=32))
    if sharded:
        writer.SINGLE_FILE_LIMIT = 0
    return tersor.compress(model, calibration=samples("llama", 4, seed=seed), out=out, **options)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(model, out)
    return out


@pytest.fixture
def unfinished(model: Path, tmp_path: Path) -> Path:
    """What is left of a job that ended after its first block."""
    out = tmp_path / "out"

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("compressed") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=stop)
    assert len(list((out / FOLDER).glob("model.layers.*.safetensors"))) == 1
    return out


# Every attempt is a process of its own, forked from one that has imported everything but computed nothing.
NURSERY = """
import json, os, sys
import torch, transformers.models.llama.modeling_llama
from pathlib import Path
from test_nothing_is_lost import quantize

torch.set_num_threads(1)
for line in sys.stdin:
    model, out, options = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quantize(Path(model), Path(out), **options)
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts jobs, and kills them where asked to."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, model: Path, out: Path, **options: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(model), str(out), options]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def nursery():  # type: ignore[no-untyped-def]
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()


def until(happens: Any, seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline and not happens():
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "a shard a block"])
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, nursery: Nursery, sharded: bool
) -> None:
    chance = random.Random(int(sharded))
    options = {"sharded": sharded}
    nursery.start(model, tmp_path / "whole", **options)
    started = time.perf_counter()
    assert nursery.wait() == 0
    whole = time.perf_counter() - started
    expected = contents(tmp_path / "whole")
    assert ("model.safetensors" in expected) == (not sharded)

    kills = 0
    for job in range(100):
        out = tmp_path / f"out{job}"
        while True:
            child = nursery.start(model, out, **options)
            before = _listing(out)
            if chance.random() < 0.3:  # at any time
                time.sleep(chance.uniform(0, 1.1 * whole))
            else:  # a moment after some file appears or goes: where the window for mistakes is
                changes = chance.randint(1, 12)
                for _ in range(changes):
                    until(lambda: _listing(out) != before or not _lives(child), 1.5 * whole)  # noqa: B023
                    before = _listing(out)
                time.sleep(chance.choice([0, 0, 0.0003, 0.001, 0.005, 0.05]))
            if _lives(child):
                os.kill(child, signal.SIGKILL)
            code = nursery.wait()
            check_whole(out)
            assert len(list(out.glob(f"{FOLDER}/.tmp*"))) <= 1
            if code != -signal.SIGKILL:
                assert code == 0
                break
            kills += 1
            if out.exists() and not (out / FOLDER / "journal.json").exists() and (out / "config.json").exists():
                break  # killed after its result was finished
        found = {name: data for name, data in contents(out).items() if not name.startswith(FOLDER)}
        assert found == expected
        if kills >= KILLS / 2:
            return


def _listing(out: Path) -> set[Path]:
    try:
        return set(out.rglob("*"))
    except OSError:
        return set()


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"method": GPTQ(bits=8, group_size=32)}, "bits"),
        ({"method": RTN(group_size=32)}, "method and calibration"),
        ({"rules": [{"match": "*.down_proj", "bits": 8}]}, "rules"),
        ({"format": "gptq_v2"}, "format"),
        ({"exclude": ["*.0.mlp.*"]}, "exclude"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"seed": 2}, "calibration"),
        ({"method": GPTQ(bits=8, group_size=32), "seed": 2}, "bits and calibration"),
    ],
)
def test_a_changed_job_is_refused_with_what_changed(
    model: Path, unfinished: Path, changed: dict[str, Any], what: str
) -> None:
    before = contents(unfinished)
    with pytest.raises(TersorError, match=f"unfinished job with another {what}; .*--overwrite"):
        quantize(model, unfinished, **changed)
    assert contents(unfinished) == before


def test_a_changed_model_is_refused(unfinished: Path, tmp_path: Path) -> None:
    build("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(TersorError, match="another model"):
        quantize(tmp_path / "other", unfinished)


def test_an_interrupted_job_goes_on_after_its_last_block(model: Path, unfinished: Path, finished: Path) -> None:
    assert quantize(model, unfinished).summary.resumed_blocks == 1
    assert contents(unfinished) == contents(finished)


def test_where_activations_wait_and_what_is_checked_may_change_between_the_runs(
    model: Path, unfinished: Path, finished: Path
) -> None:
    quantize(model, unfinished, activations="disk", target_tp=1)
    assert contents(unfinished) == contents(finished)


def test_overwrite_starts_anew(model: Path, unfinished: Path, finished: Path, tmp_path: Path) -> None:
    result = quantize(model, unfinished, overwrite=True)
    assert result.summary.resumed_blocks == 0
    assert contents(unfinished) == contents(finished)
    (unfinished / "mine.txt").write_text("not of tersor's")
    before = contents(unfinished)
    with pytest.raises(TersorError, match=r"holds what tersor did not write.*: mine\.txt would be lost"):
        quantize(model, unfinished, method=GPTQ(bits=8, group_size=32), overwrite=True)
    assert contents(unfinished) == before
    (unfinished / "mine.txt").unlink()
    quantize(model, unfinished, method=GPTQ(bits=8, group_size=32), overwrite=True)
    assert contents(unfinished).keys() == contents(finished).keys()


def test_overwriting_can_be_interrupted_too(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(model, out, method=GPTQ(bits=8, group_size=32))
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model.safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, overwrite=True)
    assert (out / "model.safetensors").exists()
    assert not (out / "config.json").exists()
    quantize(model, out)
    assert contents(out) == contents(finished)


def test_overwrite_does_not_empty_what_is_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(TersorError, match="no model directory"):
        quantize(model, tmp_path, overwrite=True)
    assert (tmp_path / "letters.txt").exists()


def test_a_finished_result_is_neither_lost_nor_made_again_unasked(model: Path, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(TersorError, match="finished result of this very command"):
        quantize(model, finished)
    with pytest.raises(TersorError, match="exists and is not empty"):
        quantize(model, finished, seed=2)
    assert contents(finished) == before


def test_redo_solves_the_blocks_of_matching_layers_of_an_unfinished_job_again(
    model: Path, unfinished: Path, finished: Path
) -> None:
    result = quantize(model, unfinished, redo=["model.layers.0.*.q_proj"])
    assert result.summary.resumed_blocks == 0
    assert contents(unfinished) == contents(finished)


@pytest.mark.parametrize(("pattern", "kept"), [("model.layers.0.*", 1), ("*.1.mlp.down_proj", 1), ("*", 0)])
def test_redo_on_a_finished_result_gives_the_same_bytes(
    model: Path, finished: Path, tmp_path: Path, pattern: str, kept: int
) -> None:
    out = tmp_path / "out"
    quantize(model, out)
    result = quantize(model, out, redo=[pattern])
    assert result.summary.resumed_blocks == kept
    assert contents(out) == contents(finished)


def test_redo_that_matches_nothing_is_refused(model: Path, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(TersorError, match=r"--redo \*\.nothing matches none"):
        quantize(model, finished, redo=["*.nothing"])
    assert contents(finished) == before


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    def words(seed: int, name: str) -> bytes:
        out = tmp_path / name
        tersor.compress("demo", GPTQ(), samples=1, seq_len=16, seed=seed, include=["*.0.mlp.down_proj"], out=out)
        return (out / "model.safetensors").read_bytes()

    first = words(0, "first")
    assert words(0, "again") == first
    assert words(1, "other") != first


def test_a_result_is_declared_finished_only_once_it_is_verified(
    model: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tersor.compress.stream._read_back", lambda *_: torch.full((1, 24, 96), 7.0))
        with pytest.raises(TersorError, match="do not use it"):
            quantize(model, out)
    with pytest.raises(TersorError, match="unfinished job"):
        tersor.load(out)
    quantize(model, out)
    assert contents(out) == contents(finished)
