"""What a report finds out by running models: the texts that they write, their speed and their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tersor.apart import EndedError, apart
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Checkpoint, Openable, resolve
from tersor.devices import DType, peak_memory
from tersor.errors import TersorError
from tersor.evaluate.bandwidth import memory_bandwidth
from tersor.evaluate.perplexity import tokens_of
from tersor.evaluate.sizes import Sizes
from tersor.progress import Progress
from tersor.report.data import Speed
from tersor.runtime import bench
from tersor.runtime.generate import check_length, end_tokens, load_module, make_engine, stream_tokens
from tersor.runtime.sampling import Sampling

PROMPTS, PROMPT_TOKENS = 3, 24  # taken from the text
TURNS, PREFIX, NEW = 5, 128, 32  # what is timed


def prompts_from(model: Openable, text: str) -> list[str]:
    """The beginnings of equal parts of a text, cut at words."""
    tokenizer = load_tokenizer(resolve(model))
    ids = tokens_of(text if text == "builtin" else Path(text), tokenizer)
    starts = [n * len(ids) // PROMPTS for n in range(PROMPTS)]
    found = [
        tokenizer.decode(ids[start : start + PROMPT_TOKENS].tolist(), skip_special_tokens=True) for start in starts
    ]
    return [each.strip() for each in found if each.strip()]


def continuations(
    models: Mapping[str, Checkpoint],
    prompts: Sequence[str],
    new_tokens: int,
    dtype: DType,
    device: str,
    progress: Progress,
) -> dict[str, list[str]]:
    """What each model writes after each prompt, always the likeliest token; the tokenizer is the first model's."""
    tokenizer = load_tokenizer(next(iter(models.values())).directory)
    written: dict[str, list[str]] = {}
    for n, (name, checkpoint) in enumerate(models.items()):
        progress(f"{name}: writing", n, len(models))
        module = load_module(checkpoint, dtype=dtype, device=device)
        end = end_tokens(module, tokenizer)
        inputs = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        for prompt, ids in zip(prompts, inputs, strict=True):
            if ids.shape[1] == 0:
                raise TersorError(f"the prompt {prompt!r} has no tokens; give at least one to continue")
            check_length(module, ids.shape[1], new_tokens)
        engine = make_engine(module, capacity=max(ids.shape[1] for ids in inputs) + new_tokens, take_over=True)
        written[name] = []
        for ids in inputs:
            engine.reset()
            pieces = stream_tokens(
                engine, tokenizer, ids, max_new_tokens=new_tokens, sampling=Sampling(temperature=0), end=end
            )
            written[name].append("".join(pieces))
    progress("writing", len(models), len(models))
    return written


def measure_speed(models: Mapping[str, Sizes], dtype: DType, device: str, progress: Progress) -> dict[str, Speed]:
    """Measures each model in a process of its own, one after another: its peak of memory is then its own.

    Raises TersorError where a model does not make text.
    """
    found: dict[str, Speed] = {}
    for n, (name, sizes) in enumerate(models.items()):
        progress(f"{name}: measuring", n, len(models))
        try:
            found[name] = apart(_speed_of, name, sizes, dtype, device)
        except EndedError as error:
            raise TersorError(f"{name} could not be measured: {error}") from None
    progress("measuring", len(models), len(models))
    return found


def _speed_of(name: str, sizes: Sizes, dtype: DType, device: str) -> Speed:
    module = load_module(name, dtype=dtype, device=device)
    most = positions_of(module)
    prefix = PREFIX if most is None else min(PREFIX, most - NEW)
    check_length(module, prefix, NEW)
    packed = sum(each.bytes for each in sizes.packed)
    dense = sum(each.numel() * each.element_size() for each in module.parameters())
    table = _looked_up(module, sizes) if sizes.looked_up else 0
    weights = None if sizes.experts else dense + packed - table
    engine = make_engine(module, capacity=prefix + NEW, take_over=True)
    ids = bench.prompt_for(module, batch=1, tokens=prefix)
    turns = bench.measure({name: lambda: bench.take_turn(engine, ids, NEW)}, repeats=TURNS)[name]
    speeds = bench.speeds(turns, prompt_tokens=prefix, new_tokens=NEW, batch=1)
    memory = peak_memory(engine.device)  # before the copies that follow
    bandwidth = memory_bandwidth(engine.device)
    cuda = engine.device.type == "cuda"
    decode, prefill = speeds["decode"], speeds["prefill"]
    return Speed(
        engine=type(engine).__name__,
        decode=(decode.median, decode.low, decode.high),
        prefill=(prefill.median, prefill.low, prefill.high),
        prompt_tokens=prefix,
        new_tokens=NEW,
        memory=memory,
        weight_bytes=weights,
        bandwidth=bandwidth,
        share=None if weights is None else decode.median * weights / bandwidth,
        where=torch.cuda.get_device_name(engine.device) if cuda else f"{torch.get_num_threads()} threads",
    )


def _looked_up(module: Any, sizes: Sizes) -> int:
    """Bytes in memory of the embedding table; a step reads one row of it. A packed one is no parameter: as on disk."""
    weight = getattr(module.get_input_embeddings(), "weight", None)
    return weight.numel() * weight.element_size() if isinstance(weight, torch.nn.Parameter) else sizes.looked_up
