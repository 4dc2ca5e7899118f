"""`tersor attribute`: which layers of a compressed model cost what, for every kind of model that can be compared."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from tersor.checkpoint.load import load
from tersor.checkpoint.source import open_checkpoint
from tersor.checkpoint.writer import model_fingerprint
from tersor.errors import TersorError
from tersor.evaluate.attribute import attribute
from tersor.evaluate.attribution import Attribution
from tersor.evaluate.measures import Meter
from tersor.evaluate.suggestion import suggest
from tersor.progress import Progress
from tersor.tasks.compared import Inputs, check_inputs, compared_on, measure_of


def attribution(
    model: str | Path,
    against: str | Path,
    inputs: Inputs,
    *,
    by: str = "layer",
    seconds: float | None = None,
    state: Path | None = None,
    layers: int = 10,
    bits: int | None = 8,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Attribution:
    """Load both models, exchange their layers, and try more bits for those that cost most.

    inputs: what predictions are compared on. seconds: the time for the exchanges. layers: how many get more bits in the trial.
    bits: how many they get; None: no trial. Raises TersorError where the two are of unlike kinds, their layers do not correspond,
    or the inputs do not fit.
    """
    mine, theirs = open_checkpoint(model), open_checkpoint(against)
    how = compared_on(mine, theirs)
    if how == "sentences":
        raise TersorError(
            f"{model} embeds sentences; layers are attributed for language models, classifiers, forecasters"
        )
    check_inputs(how, inputs)
    base = load(theirs, dtype=dtype, device=device).eval()
    measure = measure_of(theirs, base, how, inputs)
    other = load(mine, dtype=dtype, device=device).eval()
    meter = Meter(measure, base)
    both = "".join(model_fingerprint(each) for each in (mine, theirs))
    found = attribute(
        other,
        base,
        meter,
        names=(str(model), str(against)),
        by=by,
        seconds=seconds,
        state=state,
        fingerprint=hashlib.sha256(f"{both}{dtype}{device}".encode()).hexdigest(),
        progress=progress,
    )
    if bits is None or found.total_kl == 0:
        return found
    total = meter(other)
    del base, other
    try:
        tried = suggest(found, meter, total, layers=layers, bits=bits, device=device, dtype=dtype, progress=progress)
    except TersorError as error:
        return replace(found, notes=(*found.notes, f"no suggestion: {error}"))
    return replace(found, suggestion=tried)
