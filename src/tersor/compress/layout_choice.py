"""The format of a job that names none: gptq where it holds every layer, else compressed-tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tersor.compress.plan import make_plan
from tersor.compress.settings import Job
from tersor.formats.layouts import LAYOUTS
from tersor.layers.linear_map import is_conv1d, matrix_shape


def with_fitting_layout(model: nn.Module, job: Job) -> Job:
    """The job with another layout where it leaves the choice to us and its own does not hold every layer. Conv1D layers
    keep it: readers of compressed-tensors draw them at random."""
    if job.layout is None or not job.may_pad:
        return job
    taken = make_plan(model, replace(job, layout=None)).all_linears()
    if any(map(is_conv1d, taken.values())):
        return job
    for name, module in taken.items():
        found = job.layout.misfit(*matrix_shape(module))
        if isinstance(module, nn.Embedding) and not job.layout.embeddings:
            found = "an embedding's rows"
        if found:
            job.progress(f"format compressed-tensors: {name} has {found}, which {job.layout.name} does not hold", 0, 0)
            return replace(job, layout=LAYOUTS["compressed-tensors"], may_pad=False)
    return job
