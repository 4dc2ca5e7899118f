"""The calibration samples of a job."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import (
    Batch,
    Calibration,
    held_out,
    is_text,
    make_batches,
    probe_of,
    to_device,
    without_target,
)
from tersor.calibrate.images import image_batches, is_images
from tersor.calibrate.padding import shown_only
from tersor.checkpoint.load import check_tokens, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.preprocessing import class_names, image_processor, image_settings
from tersor.checkpoint.source import Checkpoint
from tersor.compress.in_memory import Source
from tersor.compress.plan import Plan
from tersor.compress.settings import Job, Settings
from tersor.errors import TersorError

HELD_OUT, FIXED, ROWS, SHORTEST, SHARE = 2048, 512, 8, 32, 4  # see `probe_for`
LOGITS = 1 << 26


def samples_of(job: Job, plan: Plan, source: Source) -> tuple[list[Batch], Batch | None]:
    """The calibration samples and the probe's, on the device. A recipe that needs no samples gets none; it gets a probe where
    there is text to take one from, or the user gave samples."""
    if source.checkpoint is not None:
        tokenizer = job.tokenizer or load_tokenizer(source.checkpoint.directory)
        job = replace(job, tokenizer=tokenizer, calibration=samples_by_path(source.checkpoint, job))
    needed = needs_samples(plan)
    if not (needed or asked_for_samples(job.calibration)):
        return [], probe_for(job, source.module, None, source.device, source.dtype)
    found = read_samples(job, source.module, source.device, source.dtype)
    moved = [without_target(batch) for batch in found]
    return (moved if needed else []), probe_for(job, source.module, moved[0], source.device, source.dtype)


def probe_for(
    job: Job, module: nn.Module, first: Batch | None, device: torch.device, dtype: torch.dtype
) -> Batch | None:
    """What the result is compared with the original on: text that nothing is calibrated on, where the samples are text; else a
    short part of the first sample, where there is one.

    So much text as the samples have, divided by SHARE, for it runs through the model several times; at most HELD_OUT tokens, and
    so many as have LOGITS outputs. FIXED tokens where there are no samples. Two windows of SHORTEST tokens at least.
    """
    tokenizer = job.tokenizer
    if tokenizer is not None and is_text(job.calibration) and (first is None or set(first) == {"input_ids"}):
        vocabulary = len(tokenizer) if hasattr(tokenizer, "__len__") else 1
        wanted = FIXED if first is None else min(HELD_OUT, job.samples * job.seq_len // SHARE)
        tokens = min(wanted, LOGITS // max(1, vocabulary))
        rows = max(2, min(ROWS, tokens // SHORTEST))
        length = max(SHORTEST, tokens // rows)
        try:
            found = held_out(tokenizer, rows=rows, length=min(length, positions_of(module) or length))
            check_tokens(module, found["input_ids"], tokenizer)
        except TersorError:  # a text or tokens that do not fit this model
            pass
        else:
            return to_device(found, device, dtype)
    return None if first is None else probe_of(first)


def is_held_out(job: Settings, batch: Batch) -> bool:
    """Whether a batch of `probe_for` is held-out text: of text it alone has several rows."""
    ids = batch.get("input_ids")
    return is_text(job.calibration) and isinstance(ids, Tensor) and len(ids) > 1


def compared_on(job: Settings, outputs: Tensor | None) -> str:
    """What `probe_for` gave, in words: of text it alone has several rows."""
    if outputs is None or not is_text(job.calibration) or len(outputs) < 2:
        return "the first sample"
    counted = f"{len(outputs)} windows" if outputs.dim() < 3 else f"{outputs.shape[0] * outputs.shape[1]:,} tokens"
    return f"{counted} of the built-in evaluation text"


def text_tokens(batches: Sequence[Batch]) -> int:
    """The tokens of samples that are text; 0 where they are none."""
    ids = [batch.get("input_ids") for batch in batches]
    return sum(each.numel() for each in ids if isinstance(each, Tensor))


def needs_samples(plan: Plan) -> bool:
    return any(method.needs_samples for method in plan.methods.values())


def asked_for_samples(calibration: Calibration) -> bool:
    """Whether the user chose samples; the built-in text is the default."""
    return not (calibration is None or (isinstance(calibration, str) and calibration == "builtin"))


def read_samples(job: Job, module: nn.Module, device: torch.device, dtype: torch.dtype) -> list[Batch]:
    """The job's calibration samples on the device, labels included."""
    batches = make_batches(
        job.calibration,
        job.tokenizer,
        samples=job.samples,
        seq_len=job.seq_len,
        seed=job.seed,
        max_positions=positions_of(module),
    )
    for batch in batches:
        if isinstance(ids := batch.get("input_ids"), Tensor):
            check_tokens(module, ids, job.tokenizer)
    two_texts = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
    rows = [row for n, batch in enumerate(batches) for row in shown_only(batch, n, encoder_decoder=two_texts)]
    return [to_device(_named_for(module, row), device, dtype) for row in rows]


def _named_for(module: nn.Module, batch: Batch) -> Batch:
    """The batch with its images under the name of the first argument of the model's forward, such as pixel_values."""
    arguments = inspect.signature(module.forward).parameters
    if "image" in arguments:
        return batch
    first = next(iter(arguments), "image")
    return {first if name == "image" else name: value for name, value in batch.items()}


def samples_by_path(checkpoint: Checkpoint, job: Job) -> Calibration:
    """The job's calibration. Where it is a path to images, they are read: batches of one image and its label."""
    given = job.calibration
    if not isinstance(given, str | Path) or not is_images(given):
        return given
    prepare = image_processor(checkpoint)
    return image_batches(
        given,
        {} if prepare is not None else image_settings(checkpoint),
        samples=job.samples,
        seed=job.seed,
        prepare=prepare,
        classes=class_names(checkpoint),
    )


def check_reached(plan: Plan, visits: Counter[str]) -> None:
    lost = [unit.name for unit in plan.blocks if plan.linears[unit.name] and not visits[unit.name]]
    if lost:
        raise TersorError(
            f"the calibration sample does not reach {lost[0]}{f' and {len(lost) - 1} more blocks' if len(lost) > 1 else ''}; "
            "give samples with all of the model's inputs, or --exclude what should stay as it is"
        )
