from __future__ import annotations

import csv
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tersor.cli.main import main
from tersor.errors import TersorError
from tersor.evaluate import sweep as module
from tersor.evaluate.sweep import sweep
from tersor.evaluate.sweep_recipes import SweepJob, jobs_of, read_jobs

SMALL = {"model": "demo", "include": ["model.layers.0.mlp.*"], "samples": 2, "seq_len": 64}


def names(jobs: list[SweepJob]) -> list[str]:
    return [job.name for job in jobs]


def test_lists_make_a_grid_named_after_what_varies() -> None:
    jobs = jobs_of("w", {**SMALL, "bits": [3, 4], "group_size": [64, 128], "damp": 0.02}, "w.yaml")
    assert names(jobs) == [f"w,bits={bits},group_size={size}" for bits in (3, 4) for size in (64, 128)]
    assert jobs[0].options() == {"bits": 3, "group_size": 64, "damp": 0.02}
    assert jobs[0].settings() == {"include": ["model.layers.0.mlp.*"], "samples": 2, "seq_len": 64}


def test_options_go_to_the_methods_that_have_them() -> None:
    jobs = jobs_of("w", {"model": "demo", "method": ["gptq", "rtn"], "damp": [0.01, 0.1]}, "w.yaml")
    assert names(jobs) == ["w,method=gptq,damp=0.01", "w,method=gptq,damp=0.1", "w,method=rtn"]


def test_settings_go_to_the_methods_that_read_them() -> None:
    jobs = jobs_of("w", {"model": "demo", "method": ["gptq", "rtn"], "samples": [2, 3], "dtype": "float32"}, "w.yaml")
    assert names(jobs) == ["w,method=gptq,samples=2", "w,method=gptq,samples=3", "w,method=rtn"]
    assert jobs[-1].settings() == {"dtype": "float32"}
    (job,) = jobs_of("w", {"model": "demo", "method": "greenformers", "head": True}, "w.yaml")
    assert (job.options(), job.settings()) == ({"head": True}, {})  # an option of the method's own


def test_rules_and_patterns_are_lists_in_themselves() -> None:
    rule = {"match": "*.down_proj", "bits": 8}
    (job,) = jobs_of("w", {"model": "demo", "rules": [rule], "exclude": ["a", "b"]}, "w.yaml")
    assert job.settings() == {"rules": [rule], "exclude": ["a", "b"]}
    assert names(jobs_of("w", {"model": "demo", "rules": [[rule], []]}, "w.yaml")) == ["w,rules=0", "w,rules=1"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"modle": "demo"}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": "demo", "grup_size": 64}, "did you mean 'group_size'"),
        ({"model": "demo", "method": "rtn", "damp": 0.1}, "unknown key 'damp'"),
        ({"model": "demo", "method": "gtpq"}, "unknown method 'gtpq'"),
        ({"model": "demo", "bits": 5}, "bits=5 is not allowed"),
        ({"model": "demo", "samples": "many"}, "samples='many' must be a int"),
        ({"model": "demo", "bits": []}, "bits is an empty list"),
        ({"model": "demo", "eval": {"txt": "builtin"}}, "did you mean 'text'"),
        ({"bits": 4}, "names no model"),
        ({"model": "demo", "method": ["rtn", "magnitude"], "samples": 8}, "samples=8 does nothing with"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        jobs_of("w", recipe, "w.yaml")


def test_the_command_line_names_models_in_place_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("bits: 3\n")
    assert [job.values["model"] for job in read_jobs([tmp_path / "w.yaml"], models=["a", "b"])] == ["a", "b"]


def test_a_finished_job_is_not_run_again_and_a_changed_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of("w", SMALL, "w.yaml")
    row = module.Row("w", "demo", "gptq", size=1)
    sweep([], tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "job.json").write_text(json.dumps(jobs[0].values))
    (tmp_path / "w" / "result.json").write_text(json.dumps(row.__dict__))
    assert sweep(jobs, tmp_path) == [row]
    with pytest.raises(TersorError, match="made with another samples"):
        sweep(jobs_of("w", {**SMALL, "samples": 3}, "w.yaml"), tmp_path)


@pytest.mark.slow
def test_one_failing_job_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.yaml").write_text(
        "model: demo\nmethod: [gptq, rtn]\ninclude: [model.layers.0.mlp.*]\nsamples: 2\nseq_len: 64\n"
        "eval: {text: builtin, seq_len: 64, max_windows: 2}\n"
    )
    (tmp_path / "bad.yaml").write_text("model: /nowhere\n")
    command = ["sweep", str(tmp_path / "w.yaml"), str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--jobs", "2"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "tersor: bad: no model at /nowhere" in printed.err
    rows = {row["name"]: row for row in json.loads(printed.out)}
    assert rows["bad"]["size"] is None
    for name in ("w,method=gptq", "w,method=rtn"):
        assert 10 < rows[name]["perplexity"] < 1000
        assert (tmp_path / "out" / name / "model" / "config.json").exists()
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows)

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("w*/model/*")}
    (tmp_path / "bad.yaml").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(tmp_path / "w.yaml"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


def heed_interrupts() -> None:
    """A job that a shell started in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("model: demo\nsamples: 4\nseq_len: 64\n")
    command = [
        sys.executable,
        "-m",
        "tersor",
        "sweep",
        str(tmp_path / "w.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    journal = tmp_path / "out" / "w" / "model" / ".tersor-job" / "journal.json"
    deadline = time.monotonic() + 200
    while not (journal.exists() and json.loads(journal.read_text())["done"]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted: give the same command again")
    assert "Traceback" not in errors
    assert journal.exists()
    (row,) = sweep(read_jobs([tmp_path / "w.yaml"]), tmp_path / "out")
    assert row.error is None
    assert json.loads((tmp_path / "out" / "w" / "summary.json").read_text())["resumed_blocks"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_runs_on_a_local_ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    jobs = [*jobs_of("w", {**SMALL, "method": ["gptq", "rtn"]}, "w.yaml"), *jobs_of("bad", {"model": "/nowhere"}, "b")]
    with (Path(tempfile.gettempdir()) / "tersor-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two clusters that start on one machine at once, one can hang
        rows = {row.name: row for row in sweep(jobs, tmp_path / "out", ray="local")}
    assert rows["bad"].error is not None
    assert "no model at /nowhere" in rows["bad"].error
    for name in ("w,method=gptq", "w,method=rtn"):
        assert rows[name].error is None
        assert (tmp_path / "out" / name / "model" / "config.json").exists()
