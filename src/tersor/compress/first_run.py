"""The first run of a model, before anything is compressed: what it takes, what it computes, and which layers it calls."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tersor.calibrate.batches import Batch, Calibration
from tersor.calibrate.padding import decoder_inputs
from tersor.compress.plan import Plan, without
from tersor.compress.samples import asked_for_samples, check_reached, needs_samples
from tersor.compress.walk import Hooks, Trace, called_only, trace
from tersor.errors import BrokenWeightError, NotFiniteError, TersorError

# What models raise where a sample is not what they take.
UNFIT = (TersorError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class Prepared:
    """plan: what is left of it once it is known which layers are called; batches, probe: the samples as the model takes them;
    traced: the probe's run. probe and traced are None where nothing is run, which only methods without samples can do."""

    plan: Plan
    batches: list[Batch]
    probe: Batch | None
    traced: Trace | None


def prepare(
    model: nn.Module, plan: Plan, calibration: Calibration, batches: list[Batch], probe: Batch | None, hooks: Hooks
) -> Prepared:
    """Run the probe. Raises TersorError where samples are needed, or were asked for, and do not fit the model."""
    if probe is None:
        return Prepared(plan, batches, None, None)
    optional = not (needs_samples(plan) or asked_for_samples(calibration))
    try:
        traced, batches, probe = _run(model, batches, probe, hooks)
    except (NotFiniteError, BrokenWeightError):
        raise
    except UNFIT as error:
        if not optional:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hooks.progress(f"nothing is compared: the model does not run on the sample ({reason})", 0, 0)
        return Prepared(plan, [], None, None)
    if optional and (unseen := _unreached(plan, traced)):
        hooks.progress(f"nothing is compared: the sample does not reach all blocks ({next(iter(unseen))})", 0, 0)
        seen = {name for block, each in plan.linears.items() if block not in unseen for name in each}
        return Prepared(without(plan, {name for name in seen if not traced.is_called(name)}), [], None, None)
    plan = called_only(plan, traced)
    check_reached(plan, traced.visits)
    return Prepared(plan, batches, probe, traced)


def _run(model: nn.Module, batches: list[Batch], probe: Batch, hooks: Hooks) -> tuple[Trace, list[Batch], Batch]:
    try:
        return trace(model, probe, hooks), batches, probe
    except UNFIT as error:
        if isinstance(error, TersorError) or not lacks_second_text(model, probe):
            raise
    *batches, probe = completed(model, [*batches, probe])
    return trace(model, probe, hooks), batches, probe


def lacks_second_text(model: nn.Module, probe: Batch) -> bool:
    """Whether the model is an encoder-decoder and the sample says nothing of what its decoder reads."""
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & probe.keys()
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return takes and not given and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def completed(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """Samples for a model that reads a second text and does not make it of the first itself, as T5: with that text.

    Raises TersorError where the samples have none and it cannot be made of them.
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


def _unreached(plan: Plan, traced: Trace) -> set[str]:
    return {unit.name for unit in plan.blocks if plan.linears[unit.name] and not traced.visits[unit.name]}
