"""The first run of a model, before anything is compressed: what it takes, what it computes, and which layers it calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from tersor.calibrate.batches import Batch
from tersor.calibrate.padding import decoder_inputs
from tersor.compress.in_memory import Source
from tersor.compress.plan import Plan, without
from tersor.compress.samples import asked_for_samples, check_reached, is_held_out, needs_samples
from tersor.compress.settings import Job
from tersor.compress.walk import Prepared, Probe, called_only, trace
from tersor.errors import BrokenWeightError, NotFiniteError, TersorError

T = TypeVar("T")

# What models raise for a sample that they cannot take.
UNFIT = (TersorError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError)


def prepare(source: Source, plan: Plan, job: Job, batches: list[Batch], batch: Batch | None) -> Prepared:
    """Run the probe's batch. Raises TersorError where samples are needed, or were asked for, and do not fit the model."""
    if batch is None:
        return Prepared(plan, batches, None)
    held_out = is_held_out(job, batch)

    def first_pass(each: Batch) -> Probe:
        return trace(source, each, job.progress, held_out=held_out)

    optional = not (needs_samples(plan) or asked_for_samples(job.calibration))
    try:
        probe, batches, _ = fitted(source.module, batches, batch, first_pass)
    except (NotFiniteError, BrokenWeightError):
        raise
    except UNFIT as error:
        if not optional:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        job.progress(f"nothing is compared: the model does not run on the sample ({reason})", 0, 0)
        return Prepared(plan, [], None)
    if optional and (unseen := _unreached(plan, probe)):
        job.progress(f"nothing is compared: the sample does not reach all blocks ({next(iter(unseen))})", 0, 0)
        seen = {name for block, each in plan.linears.items() if block not in unseen for name in each}
        return Prepared(without(plan, {name for name in seen if not probe.is_called(name)}), [], None)
    plan = called_only(plan, probe)
    check_reached(plan, probe.visits)
    return Prepared(plan, batches, probe)


def fitted(
    model: nn.Module, batches: list[Batch], batch: Batch, run: Callable[[Batch], T]
) -> tuple[T, list[Batch], Batch]:
    """What `run` returns for a batch, and the samples as the model takes them: with decoder inputs where it needs them."""
    try:
        return run(batch), batches, batch
    except UNFIT as error:
        if isinstance(error, TersorError) or not _lacks_second_text(model, batch):
            raise
    *batches, batch = _completed(model, [*batches, batch])
    return run(batch), batches, batch


def _lacks_second_text(model: nn.Module, probe: Batch) -> bool:
    """Whether the model is an encoder-decoder and the sample has no input for its decoder."""
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & probe.keys()
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return takes and not given and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _completed(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The samples with a second text, for a model such as T5 whose decoder reads one and does not derive it from the first.

    Raises TersorError where the second text cannot be made from the samples.
    """
    config = getattr(model, "config", None)
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((each for each in starts if isinstance(each, int)), None)
    for batch in batches:
        ids = batch.get("input_ids")
        if start is None or not isinstance(ids, Tensor) or ids.dim() != 2:
            raise TersorError(
                f"{type(model).__name__} reads a second text: the samples lack decoder_input_ids, which cannot be made of their "
                f"{', '.join(map(str, batch))}"
            )
    assert start is not None
    return [decoder_inputs(batch, start) for batch in batches]


def _unreached(plan: Plan, probe: Probe) -> set[str]:
    return {unit.name for unit in plan.blocks if plan.linears[unit.name] and not probe.visits[unit.name]}
