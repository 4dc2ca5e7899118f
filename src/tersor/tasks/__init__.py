"""What models are for: one file a task, and the verbs that dispatch on it.

A model says its task and its kind of input in `@register`; `task_of(task, input)` is what tersor knows of both. A file with a
`TASK` is a task's (the others help them); it is imported when it is asked for. `classify` is for images, `classify_points.py`
for models that classify points.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

from tersor.errors import TersorError
from tersor.tasks.task import Prediction, Sets, Task

__all__ = ["Prediction", "Sets", "Task", "task_named", "task_of", "tasks"]


@functools.cache
def tasks() -> tuple[str, ...]:
    """The names of the tasks that can be trained or shown."""
    files = Path(__file__).parent.glob("*.py")
    found = [path.stem for path in files if re.search(r"^TASK\b", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return tuple(sorted(name.replace("_", "-") for name in found))


def task_named(name: str) -> Task:
    """Raises TersorError where a task is not known (yet): its models can be built, loaded and compressed all the same."""
    if name not in tasks():
        raise TersorError(f"no verb works on the task {name!r} yet, only on {', '.join(tasks())}")
    task: Task = importlib.import_module(f"tersor.tasks.{name.replace('-', '_')}").TASK
    return task


def task_of(task: str, input: str) -> Task:
    """The task of a model with this kind of input: its own file where there is one, else the task's."""
    own = f"{task}-{input}"
    return task_named(own if own in tasks() else task)
