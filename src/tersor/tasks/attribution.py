"""`tersor attribute`: which layers of a compressed model cost what, for every kind of model that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tersor.checkpoint.load import load
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.checkpoint.writer import model_fingerprint
from tersor.devices import DType, name_of_dtype
from tersor.errors import TersorError
from tersor.evaluate.attribute import Exchange, InMemory, attributed
from tersor.evaluate.attribution import Attribution
from tersor.evaluate.measures import Meter
from tersor.evaluate.streamed import Streamed, Walked, fits, walked_measure
from tersor.evaluate.suggestion import suggest
from tersor.progress import Progress
from tersor.tasks.compared import WINDOWS, Inputs, check_inputs, compared_on, measure_of

Distances = Callable[[Path], Tensor]


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
    stream: bool | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Attribution:
    """Exchange the layers of two models, and try more bits for those that cost most.

    inputs: what predictions are compared on. seconds: the time for the exchanges. layers: how many get more bits in the trial.
    bits: how many they get; None: no trial. stream: a block of each in memory, which language models can do (None: where both
    do not fit). Raises TersorError where the two are of unlike kinds, their layers do not correspond, or the inputs do not fit.
    """
    mine, theirs = open_checkpoint(model), open_checkpoint(against)
    how = compared_on(mine, theirs)
    if how in ("sentences", "graph"):
        what = "embeds sentences" if how == "sentences" else "predicts graphs"
        raise TersorError(f"{model} {what}; layers are attributed for language models, classifiers, forecasters")
    check_inputs(how, inputs)
    if stream and how != "text":
        raise TersorError(f"--stream is for language models; {model} is compared on {how}")
    if stream is None:
        stream = how == "text" and not fits(theirs, copies=2, dtype=dtype, device=device)
    opened = _streamed if stream else _in_memory
    exchange, distances = opened(mine, theirs, how, inputs, dtype, device)
    both = "".join(model_fingerprint(each) for each in (mine, theirs))
    found = attributed(
        exchange,
        names=(str(model), str(against)),
        by=by,
        seconds=seconds,
        state=state,
        fingerprint=hashlib.sha256(f"{both}{name_of_dtype(dtype)}{device}{stream}".encode()).hexdigest(),
        progress=progress,
    )
    if bits is None or found.total_kl == 0:
        return found
    total = exchange.total()
    del exchange
    try:
        tried = suggest(found, distances, total, layers=layers, bits=bits, device=device, progress=progress)
    except TersorError as error:
        return replace(found, notes=(*found.notes, f"no suggestion: {error}"))
    return replace(found, suggestion=tried)


def _in_memory(
    model: Checkpoint, against: Checkpoint, how: str, inputs: Inputs, dtype: DType, device: str
) -> tuple[Exchange, Distances]:
    """Both models, and how far the model in a folder is from the original's predictions, which stay in memory alone."""
    base = load(against, dtype=dtype, device=device).eval()
    meter = Meter(measure_of(against, base, how, inputs), base)
    other = load(model, dtype=dtype, device=device).eval()
    return InMemory(other, base, meter), lambda out: meter(load(out, dtype=dtype, device=device))


def _streamed(
    model: Checkpoint, against: Checkpoint, how: str, inputs: Inputs, dtype: DType, device: str
) -> tuple[Exchange, Distances]:
    def walked(name: Openable) -> Walked:
        return Walked(open_checkpoint(name), dtype=dtype, device=device)

    base = walked(against)
    most = inputs.most or WINDOWS
    measure = walked_measure(base, inputs.text, seq_len=inputs.seq_len, max_windows=most)
    streamed = Streamed(walked(model), base, measure)
    return streamed, lambda out: streamed.distances(walked(out))
