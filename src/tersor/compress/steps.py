"""Several methods, one after another, each on the result of the last.

Where the model is given by name, the result of each step is a finished model directory in `.tersor-steps-OUT`, beside OUT. A job
that was stopped goes on with the step, and with the block, that it had reached. The folder is removed in the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.calibrate.batches import fingerprint
from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.room import RESULT_FILE, check_free, inputs_of, read_object
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.checkpoint.writer import model_fingerprint
from tersor.compress.packed import as_packed_before, check_keeps_zeros
from tersor.compress.recipe import Recipe
from tersor.compress.result import Compressed, directory_for
from tersor.compress.settings import AUTO, Job, Settings, applies, job_of
from tersor.compress.summary import Summary, loss_of
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.methods.method import BlockMethod, PackedMethod, Report
from tersor.processes import processes
from tersor.version import __version__

ASKED, REPORTED = "asked.json", "step-{}.json"
READ_WHOLE, PIECE = 1 << 26, 1 << 20  # bytes of a calibration file: see `_hash_of_file`
Run = Callable[[Openable | nn.Module, Job], Compressed]


@dataclasses.dataclass(frozen=True)
class Line(Report):
    """A row of an earlier step's report."""

    values: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        return dict(self.values)


def run_steps(
    model: Checkpoint | nn.Module, steps: Sequence[Recipe], asked: Settings, run: Run, said: dict[str, Any] | None
) -> Compressed:
    """Raises TersorError where a step cannot follow another, before anything is done. said: what `asked_for` gave, where the
    caller needed it already; it reads the calibration and the model."""
    for n, (step, following) in enumerate(itertools.pairwise(steps), 1):
        dense = isinstance(step.method, BlockMethod) and step.method.quantization() is None
        packs = isinstance(step.method, BlockMethod | PackedMethod) and not dense
        tunes = isinstance(following.method, PackedMethod)
        if packs and not tunes:
            raise TersorError(
                f"step {n}, {step.method.name}, packs the weights, which no later step can change: put it last"
            )
        if isinstance(following.method, PackedMethod):
            check_keeps_zeros(following.method, [m.options() for each in steps[:n] for m in each.methods])
        if tunes and not packs:
            raise TersorError(
                f"step {n + 1}, {following.method.name}, tunes packed weights: put gptq or rtn in front of it"
            )
    if asked.original is not None and not isinstance(steps[0].method, PackedMethod):
        raise TersorError("the steps know the original, which is what the first one reads: leave original out")
    if processes() > 1:
        raise TersorError("a recipe of several steps runs in one process: start it without torchrun")
    if asked.redo:
        raise TersorError("redo works on the result of one method, not of several steps; leave it out")
    if isinstance(model, nn.Module):
        return _in_memory(model, steps, asked, run)
    return _on_disk(model, steps, asked, run, said)


def _in_memory(model: nn.Module, steps: Sequence[Recipe], asked: Settings, run: Run) -> Compressed:
    found: list[Compressed] = []
    original: nn.Module | None = asked.original
    for n in range(len(steps)):
        at = found[-1].model if found else model
        made = run(at, _job(steps, n, asked, original, by_name=False))
        if not isinstance(steps[n].method, PackedMethod):
            original = at
        elif found:
            made = replace(made, summary=as_packed_before(made.summary, found[-1].summary))
        found.append(made)
    last = found[-1]
    return replace(last, summary=_summary(asked, [each.summary for each in found], found[0].before, last.after))


def _on_disk(
    source: Checkpoint, steps: Sequence[Recipe], asked: Settings, run: Run, said: dict[str, Any] | None
) -> Compressed:
    out, temporary = directory_for(asked.out)
    folder = _folder_of(out)
    started, said = time.perf_counter(), said or asked_for(source, steps, asked)
    inputs = inputs_of(source, calibration=asked.calibration)
    for what, path in inputs.items():
        if path.resolve().is_relative_to(folder.resolve()):
            raise TersorError(
                f"the {what} ({path}) lies in {folder}, which this job uses: move it, or give another --out"
            )
    goes_on = _goes_on(folder, said, overwrite=asked.overwrite)
    if not (goes_on and (out / JOB_FOLDER).is_dir()):  # else the last step goes on in `out`
        check_free(out, overwrite=asked.overwrite, inputs=inputs)
    with disk_errors(folder):
        if not goes_on:
            _make(folder, said)
    summaries: list[Summary] = []
    at: Openable = source
    original = asked.original
    for n, step in enumerate(steps[:-1]):
        target, report = folder / str(n + 1), folder / REPORTED.format(n + 1)
        if not (target / RESULT_FILE).is_file() or read_object(report) is None:
            asked.progress(f"step {n + 1} of {len(steps)}: {step.method.name}", 0, 0)
            if target.is_dir():
                shutil.rmtree(target)  # finished, but its report was not
            result = run(at, replace(_job(steps, n, asked, original), out=target, overwrite=False))
            with disk_errors(folder):
                if n == 0 and result.before is not None:
                    save_file({"before": result.before.cpu().contiguous()}, folder / "before.safetensors")
                with replacing(report) as partial:
                    partial.write_text(json.dumps(result.summary.as_dict()))
        values = read_object(report) or {}
        summaries.append(Summary(**{**values, "layers": [Line(row["name"], row) for row in values["layers"]]}))
        if not isinstance(step.method, PackedMethod):
            original = at
        at = str(target)
    try:
        before: Tensor | None = load_file(folder / "before.safetensors")["before"]
    except (OSError, SafetensorError):
        before = None  # the model's output is no tensor
    asked.progress(f"step {len(steps)} of {len(steps)}: {steps[-1].method.name}", 0, 0)
    last = run(at, replace(_job(steps, len(steps) - 1, asked, original), out=out))
    summary = _summary(asked, [*summaries, last.summary], before, last.after)
    summary = replace(summary, model=str(source), size_before=source.size(), seconds=time.perf_counter() - started)
    shutil.rmtree(folder)
    return Compressed(summary, out, before, last.after, _folder=temporary)


def _job(steps: Sequence[Recipe], n: int, asked: Settings, original: Any, *, by_name: bool = True) -> Job:
    """Step n as a job, with the settings that do something for it. original: of the model that the step works on."""
    idle: dict[str, Any] = {
        each.name: each.default
        for each in dataclasses.fields(Settings)
        if not applies(each, steps[n].methods, by_name=by_name)
    }
    if not all(isinstance(step.method, PackedMethod) for step in steps[n + 1 :]):
        idle["format"] = AUTO  # the format asked for is that of the last step, or of the step that later ones tune
    history = [step.method.options() for step in steps[:n]]
    if isinstance(steps[n].method, PackedMethod):
        idle["original"] = original
    return job_of(steps[n], replace(asked, **idle), history=history)


def asked_for(source: Checkpoint, steps: Sequence[Recipe], asked: Settings) -> dict[str, Any]:
    """What decides the results of a job, and those between its steps, for JSON."""
    given = asked.calibration
    path = Path(given).expanduser() if isinstance(given, str | Path) else None
    if path is not None and path.is_file():
        samples: str = _hash_of_file(path)
    elif path is not None and path.is_dir():
        samples = _listing(path, (each for each in path.rglob("*") if each.is_file()))
    elif given is None or isinstance(given, str | Path):
        samples = str(given)
    elif all(isinstance(each, str) for each in given):
        samples = hashlib.sha256("\0".join(map(str, given)).encode()).hexdigest()
    else:
        samples = fingerprint([each if isinstance(each, dict) else {"x": each} for each in given])
    settings = {
        each.name: str(getattr(asked, each.name)) for each in dataclasses.fields(Settings) if each.metadata["decides"]
    }
    counts = {name: getattr(asked, name) for name in ("samples", "seq_len", "seed")}
    recipes = [{**step.method.options(), "rules": str(step.rules)} for step in steps]
    facts = {
        "version": __version__,
        "model": model_fingerprint(source),
        "files beside the model": _listing(source.directory, source.other_files()) if source.origin is None else "",
        "steps": recipes,
        "calibration": samples,
        "original": _original(asked),
        "target_tp": asked.target_tp,
    }
    said: dict[str, Any] = json.loads(json.dumps({**facts, **counts, **settings}))
    return said


def _hash_of_file(path: Path) -> str:
    """Of a file's bytes. A file above READ_WHOLE bytes would take too long: there it is size and time, and the bytes at the
    beginning, in the middle and at the end."""
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= READ_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        for at in (0, status.st_size // 2, status.st_size - PIECE):
            file.seek(at)
            digest.update(file.read(PIECE))
        return digest.hexdigest()


def _original(asked: Settings) -> list[str] | None:
    """The name of the model that was packed, and a hash of it."""
    if not isinstance(asked.original, str | Path):
        return None
    return [str(asked.original), model_fingerprint(open_checkpoint(asked.original, allow_pickle=asked.allow_pickle))]


def _listing(folder: Path, files: Iterable[Path]) -> str:
    """A hash of names, sizes and times."""
    found = sorted((str(each.relative_to(folder)), each.stat().st_size, each.stat().st_mtime_ns) for each in files)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _goes_on(folder: Path, said: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether the folder holds what an earlier run of the same job left. Raises TersorError where it holds anything else."""
    if not folder.exists():
        return False
    found = read_object(folder / ASKED)
    if found is None:
        raise TersorError(f"{folder} exists and was not made by tersor: move it, or give another --out")
    if found == said:
        return True
    if not overwrite and (folder / REPORTED.format(1)).exists():  # no step is finished: nothing is lost
        changed = [key for key in said if found.get(key) != said[key]]
        raise TersorError(
            f"{folder} holds unfinished steps of a job with another {' and '.join(changed)}; "
            "give the same command to finish it, or --overwrite to start anew"
        )
    return False


def _folder_of(out: Path) -> Path:
    """Where the results of steps lie until the last is finished."""
    return out.parent / f".tersor-steps-{out.name}"


def forget_steps(out: Path, said: Mapping[str, Any]) -> None:
    """Remove what lies between the steps of a job that is finished. said: what `asked_for` gave for it."""
    folder = _folder_of(out)
    if read_object(folder / ASKED) == said:
        shutil.rmtree(folder)


def _make(folder: Path, said: Mapping[str, Any]) -> None:
    """Make the folder between the steps, empty."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with replacing(folder / ASKED) as partial:
        partial.write_text(json.dumps(said, indent=2) + "\n")


def _summary(asked: Settings, parts: Sequence[Summary], before: Tensor | None, after: Tensor | None) -> Summary:
    """One summary of all steps: the last one's, with every layer's report and what was lost since the original."""
    layers: list[Report] = [layer for part in parts for layer in part.layers]
    counted = [part.parameters_after for part in parts if part.parameters_after is not None]
    return replace(
        parts[-1],
        model=parts[0].model,
        layers=layers,
        steps=[part.method for part in parts],
        seconds=sum(part.seconds for part in parts),
        peak_memory=max(part.peak_memory for part in parts),
        size_before=parts[0].size_before,
        parameters_before=parts[0].parameters_before,
        parameters_after=counted[-1] if counted else None,
        **{
            "divergence": None,
            "agreement": None,
            "divergences": (),
            "compared_on": None,
            **loss_of(asked, before, after),
        },
    )
