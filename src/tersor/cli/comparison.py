"""How `tersor eval --against` shows what was lost, with the anchor (the original in 8 bits) beside each figure."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from typing import TypeVar

import typer

from tersor.cli.table import wrapped
from tersor.evaluate.agreement import Agreement
from tersor.evaluate.divergence import Divergence, Passage
from tersor.evaluate.interval import Estimate
from tersor.evaluate.similarities import Similarities
from tersor.tasks.forecast_compared import ForecastsCompared
from tersor.tasks.graphs_compared import GraphsCompared

T = TypeVar("T")
COLOURS = (None, "yellow", "bright_red", "magenta")  # of a token by its divergence
INDENT = " " * 6  # of a passage that goes on below
BESIDE = "  [8 bits: "  # what the anchor's figure begins with
INTERVAL = "± is half of a 95 % interval"


def of_texts(found: Divergence, anchor: Divergence | None) -> list[str]:
    beside = _beside(found, anchor)
    quantiles = ", ".join(f"{name} {value:.3g}" for name, value in found.kl_quantiles.items())
    lines = [
        f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len}; {INTERVAL}",
        f"perplexity       {_value(found.perplexity)}, the original's {_value(found.base_perplexity)}"
        + beside(lambda each: _value(each.perplexity)),
        f"their ratio      {_value(found.ratio)}" + beside(lambda each: _value(each.ratio)),
        f"KL divergence    {_value(found.kl)} nats; {quantiles}" + beside(lambda each: _value(each.kl)),
        f"  the other way  {_value(found.reverse_kl)} nats" + beside(lambda each: _value(each.reverse_kl)),
    ]
    if found.noise_floor is not None:
        lines.append(f"  noise floor    {found.noise_floor:.3g} nats: the original with itself in bfloat16")
    lines += [
        f"same choice      {_value(found.same_top1, 100)} % of the tokens"
        + beside(lambda each: f"{_value(each.same_top1, 100)} %"),
        f"  flips          {_flips(found)}" + beside(_flips_short),
        f"  ten likeliest  {100 * found.overlap:.1f} % in common" + beside(lambda each: f"{100 * each.overlap:.1f} %"),
        "",
        "by the original's confidence   tokens        KL   same choice",
    ]
    for each in found.buckets:
        lines.append(
            f"  {each.low:.3f} to {each.high:.3f}         {each.tokens:>9,}  {each.kl:>8.4f}  {100 * each.same_top1:>10.1f} %"
        )
    lines = [*folded(lines), "", "most different, the more a token differs the stronger its colour:"]
    for passage in found.passages:
        lines += _coloured(passage)
    return lines


def _coloured(passage: Passage) -> list[str]:
    """The lines of a passage, escaped as in JSON. They are cut before they are coloured: a colour takes no column. Where the
    output is no terminal, typer.echo takes the colours away."""
    width = shutil.get_terminal_size().columns
    head, close = f'  {passage.kl:.3f} nats in window {passage.window}: "', '"'
    rest = [(letter, level) for part, _, level in passage.levels() for letter in json.dumps(part)[1:-1]]
    lines = []
    while rest or head:
        room = max(width - len(head or INDENT), 8)
        cut = len(rest)
        if cut + len(close) > room:
            cut = 1 + max((n for n in range(1, room) if rest[n][0] == " "), default=room - 1)
        now, rest = rest[:cut], rest[cut:]
        while rest and now and now[-1][0] == " ":  # no blank ends a line
            now.pop()
        shown = "".join(
            typer.style("".join(letter for letter, _ in alike), fg=COLOURS[level])
            for level, alike in itertools.groupby(now, key=lambda each: each[1])
        )
        lines.append((head or INDENT) + shown + ("" if rest else close))
        head = ""
    return lines


def of_images(found: Agreement, anchor: Agreement | None) -> list[str]:
    beside = _beside(found, anchor)
    return folded(
        [
            f"{found.images:,} images; {INTERVAL}",
            f"top-1 accuracy   {_value(found.accuracy, 100)} %, the original's {_value(found.base_accuracy, 100)} %"
            + beside(lambda each: f"{_value(each.accuracy, 100)} %"),
            f"  change         {_value(found.change, 100)} points" + beside(lambda each: _value(each.change, 100)),
            f"same class       {_value(found.agreement, 100)} % of the images"
            + beside(lambda each: f"{_value(each.agreement, 100)} %"),
            f"  flips          {_flips(found)}" + beside(_flips_short),
            f"KL divergence    {_value(found.kl)} nats" + beside(lambda each: _value(each.kl)),
        ]
    )


def of_sentences(found: Similarities, anchor: Similarities | None) -> list[str]:
    beside = _beside(found, anchor)
    return folded(
        [
            f"{found.lines:,} lines; {INTERVAL}",
            f"order of the similarities   {_value(found.rank_correlation)} (Spearman; 1: the same)"
            + beside(lambda each: _value(each.rank_correlation)),
            f"cosine to the original      {found.cosine:.4f}, at least {found.least_cosine:.4f}"
            + beside(lambda each: f"{each.cosine:.4f}, at least {each.least_cosine:.4f}"),
            f"largest change of a cosine  {found.moved:.4f}" + beside(lambda each: f"{each.moved:.4f}"),
        ]
    )


def of_forecasts(found: ForecastsCompared, anchor: ForecastsCompared | None) -> list[str]:
    beside = _beside(found, anchor)
    return folded(
        [
            f"{found.windows:,} windows of {found.horizon} rows, in standard deviations; {INTERVAL}",
            f"MSE                        {_value(found.mse)}, the original's {_value(found.base_mse)}"
            + beside(lambda each: _value(each.mse)),
            f"  change                   {_value(found.mse_change)}" + beside(lambda each: _value(each.mse_change)),
            f"MAE                        {_value(found.mae)}, the original's {_value(found.base_mae)}"
            + beside(lambda each: _value(each.mae)),
            f"  change                   {_value(found.mae_change)}" + beside(lambda each: _value(each.mae_change)),
            f"mean square between both   {_value(found.apart)}" + beside(lambda each: _value(each.apart)),
        ]
    )


def of_graphs(found: GraphsCompared, anchor: GraphsCompared | None) -> list[str]:
    beside = _beside(found, anchor)
    scale, unit = (1, "") if found.measure == "MAE" else (100, " %")
    lines = [
        f"{found.count:,} {found.of}, {found.part} ones; {INTERVAL}",
        f"{found.measure:<16} {_value(found.score, scale)}{unit}, the original's {_value(found.base_score, scale)}{unit}"
        + beside(lambda each: f"{_value(each.score, scale)}{unit}"),
        f"  change         {_value(found.change, scale)}" + beside(lambda each: _value(each.change, scale)),
    ]
    if found.same is not None:
        lines += [
            f"same answers     {_value(found.same, 100)} %"
            + beside(lambda each: "" if each.same is None else f"{_value(each.same, 100)} %"),
            f"  flips          {_flips(found)}" + beside(_flips_short),
        ]
    apart = "KL divergence" if found.measure == "accuracy" else "squared change"
    return folded([*lines, f"{apart:<16} {_value(found.apart)}" + beside(lambda each: _value(each.apart))])


SHOWN: dict[str, Callable[..., list[str]]] = {
    "text": of_texts,
    "images": of_images,
    "sentences": of_sentences,
    "data": of_forecasts,
    "graph": of_graphs,
}


def _beside(found: T, anchor: T | None) -> Callable[[Callable[[T], str]], str]:
    """What a line ends with: the same figure of the anchor."""
    return lambda figure: "" if anchor is None else f"{BESIDE}{figure(anchor)}]"


def folded(lines: Iterable[str]) -> list[str]:
    """The lines in the width of the terminal; where one is too wide, the anchor's figure goes below."""
    width = shutil.get_terminal_size().columns
    short = [line if len(line) <= width else line.replace(BESIDE, f"\n    {BESIDE.strip()} ") for line in lines]
    return wrapped(part for line in short for part in line.split("\n"))


def _flips(found: Divergence | Agreement | GraphsCompared) -> str:
    assert found.harmful_flips is not None
    assert found.helpful_flips is not None
    return (
        f"{100 * found.harmful_flips:.2f} % from right to wrong, {100 * found.helpful_flips:.2f} % from wrong to right"
    )


def _flips_short(found: Divergence | Agreement | GraphsCompared) -> str:
    assert found.harmful_flips is not None
    assert found.helpful_flips is not None
    return f"{100 * found.harmful_flips:.2f} %, {100 * found.helpful_flips:.2f} %"


def _value(estimate: Estimate, scale: float = 1) -> str:
    half = "" if estimate.half_width is None else f" ± {scale * estimate.half_width:.2g}"
    return f"{scale * estimate.mean:.4g}{half}"
