"""Many compression jobs one after another, side by side, or on a Ray cluster, and one table of what came out.

OUT holds a directory for each job: `job.json` (what was asked), `model` (the checkpoint), `summary.json` (once it is complete),
`result.json` (once it is evaluated too) or `error.txt`; and `sweep.json` and `sweep.csv`, the table. Each job runs in a process
of its own: one that fails, in whatever way, leaves the others alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import socket
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from tersor.apart import own_processes
from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.names import BUILTIN
from tersor.checkpoint.room import read_json
from tersor.compress.job import compress
from tersor.errors import TersorError
from tersor.evaluate.perplexity import perplexity
from tersor.evaluate.sweep_recipes import SweepJob
from tersor.files import replacing
from tersor.methods.method import from_options
from tersor.progress import Progress
from tersor.untrusted import check_at_once, first_words, read_json_object, readable

TABLE, CSV_TABLE = "sweep.json", "sweep.csv"
SECONDS_FOR_RAY = 5.0


@dataclass(frozen=True)
class Row:
    """One job of a sweep."""

    name: str
    model: str
    method: str
    bits: int | str | None = None
    group_size: int | None = None
    size: int | None = None  # bytes
    bits_per_weight: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    seconds: float | None = None  # of the compression
    peak_memory: int | None = None  # bytes
    error: str | None = None  # why there is no more than this


def sweep(
    jobs: Sequence[SweepJob],
    out: str | Path,
    *,
    processes: int = 1,
    ray: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Run the jobs that `out` has no result of yet. Returns a row for every job; failed ones have an `error`.

    processes: jobs at a time on this machine; each gets its share of the cores, and a GPU in turn where there are several.
    ray: the address of a Ray cluster, or "local" for one of this machine; `out` must be a directory that all its nodes
    see. cpus, gpus: what one job takes of the cluster.

    Raises TersorError where a directory in `out` was made from another recipe. After an interruption, the next call goes
    on.
    """
    check_at_once("jobs at a time", processes)
    if not (0 < cpus < math.inf and 0 <= gpus < math.inf):
        raise TersorError(f"a job cannot take {cpus} cores and {gpus} GPUs")
    if ray is not None:
        _check_answers(ray)
    with readable(out):
        out = Path(out).expanduser().resolve()
    with disk_errors(out):
        _check_table(out)
        for job in jobs:
            _check_same(job, out / job.name)
        for job in jobs:
            (out / job.name).mkdir(parents=True, exist_ok=True)
            _write(out / job.name / "job.json", job.values)
    rows = {job.name: _outcome(job, out / job.name) for job in jobs}
    todo = [job for job in jobs if not (out / job.name / "result.json").exists()]

    def finished(job: SweepJob, error: str | None) -> None:
        rows[job.name] = _outcome(job, out / job.name, error)
        _write_table(list(rows.values()), out)
        done = sum(row.error is not None or row.size is not None for row in rows.values())
        if progress is not None:
            progress(f"{job.name}: {'failed' if rows[job.name].error else 'done'}", done, len(jobs))

    if progress is not None:
        progress(f"{len(todo)} of {len(jobs)} jobs to do", len(jobs) - len(todo), len(jobs))
    if ray is not None:
        _run_on_ray(todo, out, ray, cpus, gpus, finished)
    else:
        _run_here(todo, out, processes, finished)
    _write_table(list(rows.values()), out)
    return list(rows.values())


def run_job(job: SweepJob, folder: Path) -> None:
    """Compress and evaluate; what an earlier run finished is not done again."""
    if not (folder / "summary.json").exists():
        model = folder / "model"
        method = from_options(job.method, job.options())
        # A complete model without a summary: the run ended between the two.
        complete = (model / "config.json").exists()
        found = compress(job.values["model"], method, out=model, overwrite=complete, **job.settings())
        _write(folder / "summary.json", found.summary.as_dict())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    asked = job.evaluation()
    quality = perplexity(folder / "model", **asked).perplexity if asked is not None else None
    row = Row(
        name=job.name,
        model=str(job.values["model"]),
        method=job.method,
        bits=summary["method"].get("bits"),
        group_size=summary["method"].get("group_size"),
        size=summary["size_after"],
        bits_per_weight=summary["bits_per_weight"],
        perplexity=quality,
        divergence=summary["divergence"],
        seconds=summary["seconds"],
        peak_memory=summary["peak_memory"],
    )
    _write(folder / "result.json", asdict(row))


def attempt(job: SweepJob, folder: Path) -> str | None:
    """Run a job; returns the reason where it fails. The reason is kept in error.txt, with a traceback where it is no
    TersorError."""
    (folder / "error.txt").unlink(missing_ok=True)
    try:
        run_job(job, folder)
    except TersorError as error:
        reason = " ".join(str(error).split())
        (folder / "error.txt").write_text(reason + "\n", encoding="utf-8")
        return reason
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {' '.join(str(error).split())} (see {folder / 'error.txt'})"
    return None


def _run_here(
    jobs: Sequence[SweepJob], out: Path, processes: int, finished: Callable[[SweepJob, str | None], None]
) -> None:
    context = own_processes()
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting, places = deque(jobs), list(range(processes))
    running: dict[int, tuple[BaseProcess, SweepJob, int]] = {}
    try:
        while waiting or running:
            while waiting and places:
                job, place = waiting.popleft(), places.pop(0)
                process = context.Process(target=_in_process, args=(job, out / job.name, place, threads))
                process.start()
                running[process.sentinel] = (process, job, place)
            for sentinel in wait(list(running)):
                ended, job, place = running.pop(cast(int, sentinel))
                ended.join()
                places.append(place)
                finished(job, _ended(out / job.name, ended.exitcode or 0))
    finally:
        for left, _, _ in running.values():
            left.terminate()
            left.join()


def _in_process(job: SweepJob, folder: Path, place: int, threads: int) -> None:
    torch.set_num_threads(threads)
    if torch.cuda.device_count() > 1 and job.values.get("device", "auto") in ("auto", "cuda"):
        torch.cuda.set_device(place % torch.cuda.device_count())
    try:
        failed = attempt(job, folder) is not None
    except KeyboardInterrupt:  # the sweep says so
        os._exit(130)
    raise SystemExit(int(failed))


def _ended(folder: Path, status: int) -> str | None:
    """What became of a job's process."""
    if status == 0:
        return None
    reason = folder / "error.txt"
    if status > 0 and reason.exists():
        return reason.read_text(encoding="utf-8").strip().splitlines()[-1]
    return f"the process ended with signal {-status}" if status < 0 else f"the process ended with status {status}"


def _run_on_ray(
    jobs: Sequence[SweepJob],
    out: Path,
    address: str,
    cpus: float,
    gpus: float,
    finished: Callable[[SweepJob, str | None], None],
) -> None:
    try:
        import ray
    except ImportError:
        raise TersorError("--ray needs Ray: pip install 'tersor[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except Exception as error:  # Ray raises its own and those of its transport
        raise TersorError(f"no Ray cluster at {address}: {first_words(error)}") from error
    # A fresh process for each job, as on this machine; a job is not tried twice by itself.
    work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(attempt)
    pending: dict[Any, SweepJob] = {}
    try:
        pending = {work.remote(_with_whole_paths(job), out / job.name): job for job in jobs}
        while pending:
            done = ray.wait(list(pending), num_returns=1)[0][0]
            job = pending.pop(done)
            try:
                reason = ray.get(done)
            except ray.exceptions.RayError as lost:
                reason = f"the Ray worker was lost: {str(lost).strip().splitlines()[0]}"
            if reason is None and not (out / job.name / "result.json").exists():
                reason = f"the node that ran it does not share {out} with this machine"
            finished(job, reason)
    finally:
        for each in pending:
            ray.cancel(each, force=True)
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise TersorError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^/:\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if found is None:
        if address in ("local", "auto"):
            return
        raise TersorError(f"{address!r} is no address of a Ray cluster; use HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=SECONDS_FOR_RAY).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise TersorError(f"no Ray cluster at {address}: {error}") from None


def _with_whole_paths(job: SweepJob) -> SweepJob:
    """The job with paths that do not depend on where a worker was started."""

    def whole(value: Any) -> Any:
        is_path = isinstance(value, str) and value not in (*BUILTIN, "builtin") and Path(value).expanduser().exists()
        return str(Path(value).expanduser().resolve()) if is_path else value

    values = {key: whole(value) if key in ("model", "calibration") else value for key, value in job.values.items()}
    asked = job.evaluation()
    return replace(job, values=values | ({"eval": {**asked, "text": whole(asked.get("text"))}} if asked else {}))


def _check_table(out: Path) -> None:
    """Raise TersorError where files have the names of the table and are no tables of a sweep."""
    table = read_json(out / TABLE)
    is_table = isinstance(table, list) and all(
        isinstance(row, dict) and {"name", "method"} <= row.keys() for row in table
    )
    if (out / TABLE).exists() and not is_table:
        raise TersorError(f"{out / TABLE} is no table of a sweep and would be lost; give another --out")
    path = out / CSV_TABLE
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline().strip() != ",".join(Row.__dataclass_fields__):
                raise TersorError(f"{path} is no table of a sweep and would be lost; give another --out")


def _check_same(job: SweepJob, folder: Path) -> None:
    known = folder / "job.json"
    if not known.exists():
        if folder.exists() and any(folder.iterdir()):
            raise TersorError(f"{folder} exists and is no job of a sweep; give another --out")
        return
    before, now = read_json(known), json.loads(json.dumps(job.values))
    if not isinstance(before, dict):
        raise TersorError(f"{known} does not say what job {folder} is of; give another --out, or remove {folder}")
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise TersorError(
            f"{folder} was made with another {' and '.join(changed)}; give another --out, rename the recipe, or remove it"
        )


def _outcome(job: SweepJob, folder: Path, error: str | None = None) -> Row:
    result = folder / "result.json"
    if error is None and result.exists():
        try:
            return Row(**read_json_object(result))
        except TypeError as reason:
            raise TersorError(f"{result} is no result of a sweep's job: {reason}; remove it") from None
    options = job.options()
    return Row(
        job.name,
        str(job.values["model"]),
        job.method,
        options.get("bits"),
        options.get("group_size"),
        error=error,
    )


def _write_table(rows: list[Row], out: Path) -> None:
    plain = [asdict(row) for row in rows]
    _write(out / TABLE, plain)
    with replacing(out / CSV_TABLE) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(plain)
        file.flush()


def _write(path: Path, content: Any) -> None:
    """A file that is whole or absent."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
