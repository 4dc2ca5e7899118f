"""`tersor bench`: how fast a model runs here, alone or turn by turn with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from tersor.cli.options import AsJson, Device, print_json
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table
from tersor.devices import peak_memory
from tersor.errors import TersorError
from tersor.runtime import bench as runtime
from tersor.runtime.bench import Spread, Turn
from tersor.runtime.cached_module import CachedModule
from tersor.runtime.engine import Engine
from tersor.runtime.generate import check_length, load_module, make_engine
from tersor.untrusted import check_at_once


def bench(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or `demo`.")],
    against: Annotated[str | None, typer.Option(help="Another model, which runs in turns with the first.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to make after it.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns that count; one more comes first, to warm up.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch chooses if unset.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure speed and peak memory of a language model. On a random prompt: prompt and new tokens per second, and the time to
    the first token.

    Figures are medians of the turns, with the middle half of them in brackets. With --against, both models run one after the
    other in every turn, and the ratios are those of the same turns.

    Example: `tersor bench demo-4bit --against demo --prompt-tokens 128`.
    """
    runtime.check_sizes(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch_size, repeats=repeats)
    if threads is not None:
        if threads < 1:
            raise TersorError(f"--threads {threads} must be positive")
        check_at_once("--threads", threads)
        torch.set_num_threads(threads)
    runners: dict[str, Callable[[], Turn]] = {}
    engines: dict[str, Engine] = {}
    for name in filter(None, dict.fromkeys((model, against))):
        engine, runners[name] = _runner(name, prompt_tokens, new_tokens, batch_size, dtype, device)
        engines[name] = engine
    with progress_bar(quiet=as_json) as progress:
        turns = runtime.measure(runners, repeats=repeats, progress=progress)
    memory = {"peak_memory": peak_memory(engine.device)}
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch_size}
    found = {name: runtime.speeds(each, **sizes) for name, each in turns.items()}
    runs_as = {name: _runs_as(engine) for name, engine in engines.items()}
    ratios = None if against is None or against == model else runtime.ratios(turns[model], turns[against])
    if as_json:
        result: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            **memory,
            "models": {name: {"engine": runs_as[name], **_plain(each)} for name, each in found.items()},
        }
        print_json(result if ratios is None else {**result, "ratios": _plain(ratios)})
        return
    rows = [
        (name, runs_as[name], _show(each["prefill"]), _show(each["decode"]), _show(each["first_token"], scale=1e3))
        for name, each in found.items()
    ]
    if ratios is not None:
        rows.append(("times as fast", "", _show(ratios["prefill"]), _show(ratios["decode"]), ""))
    print_table(("", "runs as", "prompt tokens/s", "new tokens/s", "first token, ms"), rows, left=(0, 1))
    where = f"{torch.get_num_threads()} threads"
    if engine.device.type == "cuda":
        where = torch.cuda.get_device_name(engine.device)
    typer.echo(
        f"\n{batch_size} x {prompt_tokens} prompt and {new_tokens} new tokens, {repeats} turns, {where}; "
        f"peak memory {memory['peak_memory'] / 1e9:.2f} GB{' with both models' if ratios is not None else ''}"
    )


def _runner(
    name: str, prompt_tokens: int, new_tokens: int, batch: int, dtype: str, device: str
) -> tuple[Engine, Callable[[], Turn]]:
    module = load_module(name, dtype=dtype, device=device)
    check_length(module, prompt_tokens, new_tokens)
    engine = make_engine(module, capacity=prompt_tokens + new_tokens, batch=batch, take_over=True)
    ids = runtime.prompt_for(module, batch=batch, tokens=prompt_tokens)
    return engine, lambda: runtime.take_turn(engine, ids, new_tokens)


def _runs_as(engine: Engine) -> str:
    """The engine's name, and whether its steps ran as a CUDA graph; call it after they ran."""
    if isinstance(engine, CachedModule):
        return type(engine).__name__ + (", CUDA graph" if engine.graphed else "")
    form = getattr(engine, "form", "")  # of LlamaGPU
    return type(engine).__name__ + (f", {form}" if form else "")


def _plain(found: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(each) for name, each in found.items()}


def _show(found: Spread, scale: float = 1.0) -> str:
    digits = 2 if found.median * scale < 10 else 1
    low, median, high = (f"{value * scale:.{digits}f}" for value in (found.low, found.median, found.high))
    return f"{median} ({low} - {high})"
