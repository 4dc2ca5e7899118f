"""EleutherAI's lm-evaluation-harness on a model as tersor runs it: its tasks by name, or tasks defined in a folder of YAML files.

`tersor-lm-eval` (`python -m tersor.tasks.harness`) is the harness's own command line with the model type `tersor` added: the
harness (0.4.13) looks for model types only in its own package, so its own script cannot find this one.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.devices import DType
from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.untrusted import first_words

_RESAMPLED = 1000  # times that the harness draws anew for the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class Metric:
    """A metric of a task."""

    task: str
    metric: str
    filter: str  # what the harness did to the answers first; `none` for nothing
    value: float
    stderr: float | None  # None where the harness gives none
    better: str | None  # whether more is better; None where the harness does not say


@dataclass(frozen=True)
class HarnessResult:
    """What the harness measured."""

    metrics: list[Metric]
    documents: dict[str, int]  # how many were evaluated, by task
    shots: dict[str, int]  # examples before each question, by task
    versions: dict[str, Any]  # of the tasks' definitions
    harness: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    max_length: int | None = None,
    chat_template: bool = False,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> HarnessResult:
    """Run tasks of the harness (`lm-eval ls tasks` lists them) on a causal language model.

    tasks_dir: a folder with YAML files that define tasks; they come before the harness's own. limit: documents of each task, the
    first ones. num_fewshot: examples before each question, by default what the task says. max_length: tokens of a window, by
    default the model's positions. chat_template: questions are put as a conversation in the form that the tokenizer gives.

    Raises TersorError where the extra `lm-eval` is missing, a task is not known, or its data cannot be read.
    """
    if limit is not None and limit < 1:
        raise TersorError(f"limit {limit} leaves nothing to evaluate; use at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise TersorError(f"num_fewshot {num_fewshot} must be 0 or above")
    lm_eval = _installed()
    model_type = _model_type()
    model_type.rows_asked(batch_size)
    with _quiet():
        manager = _manager(list(tasks), tasks_dir)
        if progress is not None:
            progress("reading the tasks' data", 0, len(tasks))
        loaded = _loaded(manager, list(tasks))
        _check_kinds(loaded["tasks"])
        language_model = model_type.TersorLM(
            model, batch_size=batch_size, max_length=max_length, dtype=dtype, device=device, progress=progress
        )
        try:
            found = lm_eval.simple_evaluate(
                model=language_model,
                tasks=list(tasks),
                task_manager=_Loaded(loaded, manager.task_index),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat_template,
                bootstrap_iters=_RESAMPLED,
                log_samples=False,
            )
        except ValueError as error:  # how the harness refuses what it does not do
            raise TersorError(f"the harness refuses {', '.join(tasks)}: {first_words(error)}") from error
    return _result(found, lm_eval.__version__)


class _Loaded:
    """Stands where the harness wants its own loader: the tasks are there already, or a line has said why not."""

    def __init__(self, found: Any, task_index: Any) -> None:
        self.found, self.task_index = found, task_index

    def load(self, _: Any) -> Any:
        return self.found


def _installed() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise TersorError(f"--tasks needs EleutherAI's harness: pip install 'tersor[lm-eval]' ({error})") from None
    return lm_eval


def _model_type() -> Any:
    return importlib.import_module("tersor.tasks.harness_model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the harness logs by default and the bars of the package that reads its data; errors stay."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    logs = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, bars = [log.level for log in logs], is_progress_bar_enabled()
    for log in logs:
        log.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        if bars:
            enable_progress_bars()


def _manager(tasks: list[str], tasks_dir: Path | None) -> Any:
    """The harness's index of tasks. Its own 14,000 are read only where they are needed."""
    from lm_eval.tasks import TaskManager

    if not tasks or not all(tasks):
        raise TersorError("--tasks names no task; `lm-eval ls tasks` lists the harness's own")
    if tasks_dir is not None:
        if not tasks_dir.is_dir():
            raise TersorError(f"no folder of tasks at {tasks_dir}")
        try:
            own = TaskManager(include_path=str(tasks_dir), include_defaults=False)
        except Exception as error:  # whatever is wrong in a YAML file
            raise TersorError(f"the tasks in {tasks_dir} cannot be read: {first_words(error)}") from error
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if tasks_dir is None else str(tasks_dir))
    known = set(manager.all_tasks)
    for each in tasks:
        if each not in known:
            near = difflib.get_close_matches(each, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists the harness's own"
            where = "the harness knows" if tasks_dir is None else f"neither the harness nor {tasks_dir} has"
            no = " no" if tasks_dir is None else " a"
            raise TersorError(f"{where}{no} task {each!r}; {hint}")
    return manager


def _loaded(manager: Any, tasks: list[str]) -> Any:
    """The tasks with their data, as the harness's manager gives them. A task that cannot be had is named."""
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for each in tasks:
        try:
            for part, entries in manager.load([each]).items():
                found[part].update(entries)
        except Exception as error:
            raise _no_data(each, error) from error
    return found


def _check_kinds(tasks: dict[str, Any]) -> None:
    """Raise TersorError for tasks that a language model of tersor does not do, before the model is loaded."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TersorError(
                f"task {name} runs the code that the model writes, which tersor eval does not do; `tersor-lm-eval run --model "
                f"tersor --tasks {name} --confirm_run_unsafe_code` does, at your own risk"
            )
        if getattr(task, "MULTIMODAL", False):
            raise TersorError(f"task {name} shows images or sounds; tersor's language models read text alone")


def _no_data(task: str, error: Exception) -> TersorError:
    """What can go wrong with a task's definition, its files and the hub: the packages raise many kinds of errors."""
    return TersorError(
        f"task {task} cannot be read: {first_words(error)}. Where there is no network, its data must have been loaded before "
        "(and HF_DATASETS_OFFLINE=1 saves the waiting), or the task must name local files (data_files)"
    )


def _result(found: Any, version: str) -> HarnessResult:
    metrics = []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        better = found["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            more = better.get(metric)
            metrics.append(
                Metric(
                    task=task,
                    metric=metric,
                    filter=filtered,
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    better=None if more is None else ("more" if more else "less"),
                )
            )
    return HarnessResult(
        metrics=metrics,
        documents={task: int(each["effective"]) for task, each in found["n-samples"].items()},
        shots={task: int(each) for task, each in found["n-shot"].items() if each is not None},
        versions=dict(found["versions"]),
        harness=version,
    )


def main() -> None:
    """The harness's command line, which then knows `--model tersor`. Arguments are read from sys.argv."""
    try:
        _installed()
        _model_type()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except TersorError as error:
        print(f"tersor: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
