"""How a job went, kept beside the checkpoint in `tersor-run.json`: command, times, memory, machine, and what the probe showed.

`tersor.json` holds what decides the bytes of a result, so the same job writes the same file. Here is what differs from run to
run. `tersor report` reads both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.room import RUN_FILE, read_object, record_of
from tersor.checkpoint.source import Openable
from tersor.compress.recipe import Recipe, plain_rule
from tersor.compress.settings import Settings
from tersor.compress.summary import Summary
from tersor.errors import FinishedError
from tersor.methods.method import BlockMethod, as_words
from tersor.processes import processes
from tersor.version import __version__

# Not part of a command that makes the result again.
NOT_GIVEN_AGAIN = ("out", "overwrite", "redo", "tokenizer", "progress")


def check_unfinished(out: Path, mark: str) -> None:
    """Raise FinishedError where `out` holds the whole result of the job with this mark."""
    record, run = record_of(out) or {}, read_object(out / RUN_FILE) or {}
    files = record.get("files")
    whole = isinstance(files, list) and all(isinstance(name, str) and (out / name).is_file() for name in files)
    if whole and run.get("asked") == mark and not (out / JOB_FOLDER).exists():
        raise FinishedError(f"{out} holds the finished result of this very command; --overwrite makes it again")


def write_run(directory: Path, run: Any) -> None:
    """Written last: where the process is killed here, the result is finished all the same."""
    with disk_errors(directory):
        text = json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n"
        (directory / RUN_FILE).write_text(text, encoding="utf-8")


def run_of(summary: Summary, model: Openable | nn.Module, steps: Sequence[Recipe], asked: Settings) -> dict[str, Any]:
    """What is kept. Times in seconds, sizes in bytes; `blocks` in the order in which they were finished."""
    device = torch.device(asked.device) if asked.device != "auto" else None
    gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    recipe = recipe_of(steps)
    return {
        "model": summary.model,
        "command": command_of(model, steps, asked),
        "recipe": recipe if len(steps) > 1 or steps[0].rules else None,
        "calibration": _described(asked.calibration),
        "samples": asked.samples,
        "seq_len": asked.seq_len,
        "seed": asked.seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": summary.seconds,
        "peak_memory": summary.peak_memory,
        "memory_of": "GPU" if gpu else "process",
        "blocks": [
            {"name": name, "seconds": seconds, "memory": summary.memory_per_block.get(name)}
            for name, seconds in summary.seconds_per_block.items()
        ],
        "layer_seconds": {
            row["name"]: row["seconds"] for row in (each.row() for each in summary.layers) if "seconds" in row
        },
        "resumed_blocks": summary.resumed_blocks,
        "processes": processes(),
        "divergence": summary.divergence,
        "agreement": summary.agreement,
        "divergences": list(summary.divergences),
        "compared_on": summary.compared_on,
        "bits_per_weight": summary.bits_per_weight,
        "size_before": summary.size_before,
        "parameters_before": summary.parameters_before,
        "parameters_after": summary.parameters_after,
        "left": list(summary.left),
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if gpu else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"tersor": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def recipe_of(steps: Sequence[Recipe]) -> dict[str, Any]:
    """The steps as a recipe file says them."""
    made = []
    for step in steps:
        options = {("method" if key == "name" else key): value for key, value in step.method.options().items()}
        rules = [plain_rule(rule) for rule in step.rules]
        made.append({**options, **({"rules": rules} if rules else {})})
    return made[0] if len(made) == 1 else {"steps": made}


def command_of(model: Openable | nn.Module, steps: Sequence[Recipe], asked: Settings) -> str | None:
    """The command that makes the result again. With rules or several steps it reads a file recipe.yaml, which holds `recipe_of`.

    None where no command can: for a module in memory, and for samples that a program gave.
    """
    if isinstance(model, nn.Module) or not isinstance(asked.calibration, str | Path | None):
        return None
    first = steps[0]
    by_file = len(steps) > 1 or bool(first.rules)
    if by_file:
        words = ["tersor", "compress", "recipe", "recipe.yaml", str(model)]
    elif isinstance(first.method, BlockMethod):
        words = ["tersor", "quantize", str(model), "--method", first.method.name]
    else:
        words = ["tersor", "compress", first.method.name, str(model)]
    if not by_file:
        words += _words(first.method)
    words += _words(asked, leave_out=NOT_GIVEN_AGAIN)
    return shlex.join([*words, "--out", "OUT" if asked.out is None else asked.out.name])


def _words(options: Any, *, leave_out: Sequence[str] = ()) -> Iterator[str]:
    """The fields of a method or of settings that differ from their defaults, as the command line takes them."""
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if each.name not in leave_out and value is not None and value != each.default:
            yield from as_words(each, value)


def _described(calibration: Any) -> str:
    if calibration is None:
        return "builtin"
    if isinstance(calibration, str | Path):
        return str(calibration)
    return "samples that a program gave"
