"""The part of the page that is about one result: five tabs, each with its plots, tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tersor.evaluate.divergence import LEVELS
from tersor.evaluate.interval import Estimate
from tersor.evaluate.loaders import REFUSED, TESTED
from tersor.report.data import Compared, Layer, Report, Result, shortened
from tersor.report.figures import (
    confidence_figure,
    experts_figure,
    heat_map,
    label_of,
    measures_of,
    packed_figure,
    size_figure,
    timeline_figure,
    value_of,
)
from tersor.report.html import Raw, details, differences, megabytes, number, plot, table, text

WORST = 5
MOST_ROWS = 400  # of the table of layers; the JSON has all
Figures = dict[str, Any]


def result_section(report: Report, at: int, anchor: str, figures: Figures, *, level: int) -> str:
    """level: of its heading. figures: to which its plots are added."""
    result = report.results[at]
    panels = {
        "Summary": _summary(report, result, anchor, figures),
        "Where": _where(result, anchor, figures),
        "Weights": _weights(result, at, anchor, figures),
        "Text": _text(report, result),
        "Job and machine": _run(report, result, anchor, figures),
    }
    tabs, bodies = [], []
    for n, (name, inside) in enumerate(panels.items()):
        tab, panel = f"{anchor}-tab-{n}", f"{anchor}-panel-{n}"
        chosen = "true" if n == 0 else "false"
        tabs.append(
            f'<button type="button" role="tab" id="{tab}" aria-controls="{panel}" aria-selected="{chosen}">{name}</button>'
        )
        bodies.append(f'<div role="tabpanel" id="{panel}" aria-labelledby="{tab}" tabindex="0">{inside}</div>')
    return (
        f'<section id="{anchor}" tabindex="-1" aria-labelledby="{anchor}-name"><h{level} id="{anchor}-name">'
        f"{text(report.label(result))}</h{level}>{_cards(report, result)}"
        f'<div role="tablist" aria-label="Parts of the report on {text(report.label(result))}">{"".join(tabs)}</div>'
        f"{''.join(bodies)}</section>"
    )


def _cards(report: Report, result: Result) -> str:
    """The few numbers that most readers look for."""
    size, before = result.sizes.files, _size_before(report, result)
    smaller = f"{before / size:.2f}x smaller than {megabytes(before)}" if before else "all tensor files"
    cards = [("On disk", megabytes(size), smaller)]
    if result.sizes.packed_bits is not None:
        cards.append(("Bits a packed weight", f"{result.sizes.packed_bits:.3f}", "steps and zero points included"))
    if result.compared:
        found = result.compared[0].found
        cards.append(("KL from the original", _value(found.kl), "nats a token, ± half of a 95 % interval"))
        cards.append(("Same first choice", f"{_value(found.same_top1, 100)} %", "of the tokens"))
        cards.append(
            ("Perplexity", f"{found.perplexity.mean:.4g}", f"the original's is {found.base_perplexity.mean:.4g}")
        )
    elif isinstance(result.run.get("divergence"), float):
        on = f"on {result.run.get('compared_on') or 'the first sample'}"
        cards.append(("KL after the job", f"{result.run['divergence']:.4f}", f"nats from the original, {on}"))
        cards.append(("Same first choice", f"{result.run['agreement']:.1%}", on))
    if result.speed is not None:
        cards.append(("New tokens a second", f"{result.speed.decode[0]:.1f}", f"here, on {result.speed.where}"))
    elif isinstance(result.run.get("seconds"), float):
        cards.append(("The job took", f"{result.run['seconds']:.1f} s", f"peak {megabytes(result.run['peak_memory'])}"))
    inside = "".join(
        f'<div><dt>{text(name)}</dt><dd class="big">{text(value)}</dd><dd class="muted">{text(more)}</dd></div>'
        for name, value, more in cards
    )
    return f'<dl class="cards">{inside}</dl>'


def _size_before(report: Report, result: Result) -> int | None:
    if report.base is not None:
        return report.base.sizes.files
    kept = result.run.get("size_before")
    return kept if isinstance(kept, int) else None


def _value(estimate: Estimate, scale: float = 1) -> str:
    half = "" if estimate.half_width is None else f" ± {scale * estimate.half_width:.2g}"
    return f"{scale * estimate.mean:.4g}{half}"


# ---- Summary


def _summary(report: Report, result: Result, anchor: str, figures: Figures) -> str:
    figures[f"{anchor}-size"] = size_figure(report, [each for each in (report.base, result) if each is not None])
    drawn = plot(f"{anchor}-size", f"{anchor}-size", "The bytes of the whole model, by the role of the tensor")
    packed = packed_figure(result)
    if packed is not None:
        figures[f"{anchor}-packed"] = packed
        label = f"What the {result.sizes.packed_bits:.3f} bits of a packed weight hold, on average"
        drawn = f'<div class="pair">{drawn}{plot(f"{anchor}-packed", f"{anchor}-packed", label)}</div>'
    total = sum(part.bytes for part in result.sizes.everything) or 1
    rows = [(part.kind, megabytes(part.bytes), f"{part.bytes / total:.1%}") for part in result.sizes.everything]
    rows += [(f"in packed layers: {p.kind}", megabytes(p.bytes), f"{p.bytes / total:.1%}") for p in result.sizes.packed]
    sizes = table("Size by kind of tensor", ["kind", "size", "share"], rows, numbers=(1, 2))
    return (
        f"<h3>What was lost</h3>{_fidelity(report, result, anchor, figures)}<h3>Size</h3>{drawn}"
        f"{details('Sizes as numbers', sizes)}<h3>What it is</h3>{_what(report, result)}"
    )


def _what(report: Report, result: Result) -> str:
    run, record = result.run, result.record
    method = record.get("method") or {}
    marks = record.get("fingerprint") or {}
    rows: list[tuple[str, object]] = [("architecture", result.architecture)]
    original = run.get("model") or (report.base.name if report.base else None)
    if original is not None:
        rows.append(("original", original))
    if method:
        options = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
        rows.append(("method", f"{method.get('name')}: {options}" if options else method.get("name")))
        rows.append(("format", record.get("format", "")))
    if "calibration" in run:
        sample = f"{run.get('samples')} samples of {run.get('seq_len')} tokens from {run['calibration']}"
        rows.append(("calibration", f"{sample}, seed {run.get('seed')}"))
    for key, value in (("original's weights", record.get("source")), ("samples", marks.get("calibration"))):
        if value:
            rows.append((f"SHA-256 of the {key}", Raw(f"<code>{text(value)}</code>")))
    left = run.get("left")
    if isinstance(left, list) and left:
        rows.append(("left as they were", ", ".join(map(str, left[:8])) + (", ..." if len(left) > 8 else "")))
    if not record:
        rows.append(("record", "none: no job of tersor's wrote this directory"))
    return table("What this model is, and how it was made", ["", ""], rows)


def _fidelity(report: Report, result: Result, anchor: str, figures: Figures) -> str:
    if not result.compared:
        kept = result.run.get("divergence")
        if isinstance(kept, float):
            return (
                f"<p>On {text(result.run.get('compared_on') or 'the first sample')} the predictions are "
                f"{kept:.4f} nats (KL divergence) from the original's, and "
                f"{result.run['agreement']:.1%} of the first choices are the same.</p>"
                + _hint(report, "compare the models token by token, with intervals and a noise floor")
            )
        return "<p>The job compared nothing: no sample ran through the model.</p>" + _hint(report, "compare the models")
    figure = confidence_figure(result)
    assert figure is not None
    figures[f"{anchor}-confidence"] = figure
    floor = " The dashed line is the noise floor." if result.compared[0].found.noise_floor is not None else ""
    label = (
        "KL divergence from the original, by the probability that it gave its first choice, and of all tokens with a "
        f"95 % interval.{floor}"
    )
    drawn = plot(f"{anchor}-confidence", f"{anchor}-confidence", label)
    names = shortened([each.text for each in result.compared])
    tables = "".join(_compared(each, names[each.text]) for each in result.compared)
    said = "".join(_verdict(each, names[each.text]) for each in result.compared)
    return f'{said}<div class="pair">{drawn}<div>{tables}</div></div>'


def _verdict(each: Compared, name: str) -> str:
    """KL beside the noise floor, in a sentence."""
    found = each.found
    where = f"On {text(name)} ({found.tokens:,} tokens in {found.windows} windows)"
    if found.noise_floor is None:
        return f"<p>{where} the KL divergence is {_value(found.kl)} nats.</p>"
    floor = f"the noise floor of {found.noise_floor:.3g}, the original beside itself in bfloat16"
    low = found.kl.mean - (found.kl.half_width or 0)
    if low <= found.noise_floor:
        said = f"cannot be told from {floor}"
    else:
        said = f"is {found.kl.mean / max(found.noise_floor, 1e-12):,.1f} times {floor}"
    return f"<p>{where} the KL divergence of {_value(found.kl)} nats {said}.</p>"


def _compared(each: Compared, name: str) -> str:
    found = each.found
    rows: list[tuple[str, str]] = [
        ("perplexity", _value(found.perplexity)),
        ("the original's", _value(found.base_perplexity)),
        ("their ratio, paired", _value(found.ratio)),
        ("KL, nats", _value(found.kl)),
        ("KL, the other way", _value(found.reverse_kl)),
        *((f"KL, {name}", number(value)) for name, value in found.kl_quantiles.items()),
        ("noise floor", number(found.noise_floor)),
        ("same first choice", f"{_value(found.same_top1, 100)} %"),
        ("ten likeliest in common", f"{100 * found.overlap:.1f} %"),
        ("right to wrong", f"{100 * found.harmful_flips:.2f} %"),
        ("wrong to right", f"{100 * found.helpful_flips:.2f} %"),
    ]
    return table(f"On {name}; ± is half of a 95 % interval over windows", ["", "value"], rows, numbers=(1,))


def _hint(report: Report, what: str) -> str:
    return (
        ""
        if report.base is not None
        else f'<p class="help muted">With <code>--against ORIGINAL</code> a report can {what}.</p>'
    )


# ---- Where


def _where(result: Result, anchor: str, figures: Figures) -> str:
    layers = result.layers
    known = measures_of(layers)
    if not known:
        return "<p>No layer was reported on: the method works on the whole model, and nothing was compared.</p>"
    first = next((key for key in ("cost", "error", "relative_error") if key in known), known[0])
    for key in known:
        figures[f"{anchor}-map-{key}"] = heat_map(layers, key, label_of(result, key))
    options = "".join(
        f'<option value="{anchor}-map-{key}"{" selected" if key == first else ""}>{text(label_of(result, key))}</option>'
        for key in known
    )
    chooser = (
        f'<p class="choice"><label for="{anchor}-measure">Show </label>'
        f'<select id="{anchor}-measure" data-plot="{anchor}-map">{options}</select></p>'
    )
    drawn = plot(
        f"{anchor}-map", f"{anchor}-map-{first}", f"Heat map: {label_of(result, first)}, by block and projection"
    )
    more = []
    for key, what in (("bits", "Bits a weight on disk, layer by layer"), ("condition", _CONDITION)):
        if key in known:
            more.append(plot(f"{anchor}-{key}", f"{anchor}-map-{key}", what))
    both = f'<h3>Bits and conditioning</h3><div class="pair">{"".join(more)}</div>{_damping(layers)}' if more else ""
    return (
        f"<h3>Which layers cost what</h3>{_explained(result, first)}{_worst(result, first)}{chooser}{drawn}{both}"
        f"{_experts(layers, anchor, figures)}{_reported(result)}{details('All layers as numbers', _layer_table(result, known))}"
    )


_CONDITION = "Conditioning: a lower bound of the damped Hessian's condition number, from its Cholesky factor's diagonal"


def _explained(result: Result, key: str) -> str:
    if key == "cost":
        found = result.attributed or {}
        total, squared = found.get("total_kl"), found.get("measure") == "MSE"
        what = "mean squared difference of the forecasts" if squared else "KL divergence"
        whole = f" of {total:.4g}{'' if squared else ' nats'} in all" if isinstance(total, float) else ""
        left = len(found.get("left") or ())
        rest = (
            f" {left:,} were not measured in the time given and have no cost here; where that is a whole block, its own cost is."
            if left
            else ""
        )
        return (
            f"<p>Costs are those of <code>tersor attribute</code>: the {what}{whole} that a layer causes, the mean of "
            f"compressing it alone and of restoring it alone. Layers that were exchanged together share a row.{rest}</p>"
        )
    if key == "error":
        return (
            "<p>The error is the method's own measure: for GPTQ half of the squared error of the layer's outputs over the "
            "calibration inputs. It says how hard a layer was to quantize, not how much the model lost by it; "
            "<code>tersor attribute</code> measures that.</p>"
        )
    if key == "relative_error":
        return "<p>‖W - Q‖ / ‖W‖ is how far a layer's weights moved, without regard to its inputs.</p>"
    return ""


def _worst(result: Result, key: str) -> str:
    """The five layers with the largest values."""
    valued = [(each, value) for each in result.layers if (value := value_of(each, key)) is not None]
    worst = sorted(valued, key=lambda each: -each[1])[:WORST]
    total = sum(value for _, value in valued)
    with_share = key in ("error", "cost") and total > 0
    rows = [
        (each.name, number(value), f"{value / total:.1%}" if with_share else "", number(each.bits), each.note)
        for each, value in worst
    ]
    heads = ["layer", label_of(result, key), "share of all", "bits", "note"]
    return table(f"The {len(rows)} worst layers", heads, rows, numbers=(1, 2, 3)) if rows else ""


def _damping(layers: list[Layer]) -> str:
    known = [each for each in layers if each.damp is not None and each.damp > 0]
    if not known:
        return ""
    usual = min(each.damp or 0 for each in known)
    raised = [each.name for each in known if (each.damp or 0) > usual]
    if not raised:
        return f"<p>Damping was {usual:g} of the Hessian's mean diagonal in all {len(known)} layers.</p>"
    names = ", ".join(text(name) for name in raised[:8]) + (", ..." if len(raised) > 8 else "")
    return f"<p>Damping was {usual:g} and had to be raised in {len(raised)} of {len(known)} layers: {names}.</p>"


def _experts(layers: list[Layer], anchor: str, figures: Figures) -> str:
    figure = experts_figure(layers)
    if figure is None:
        return ""
    figures[f"{anchor}-experts"] = figure
    tokens = [each.tokens for each in layers if "*" in each.kind and each.tokens is not None]
    return (
        "<h3>Expert coverage</h3>"
        + plot(f"{anchor}-experts", f"{anchor}-experts", "Calibration tokens that reached each expert")
        + f"<p>{min(tokens):,} to {max(tokens):,} tokens reached a map of an expert; {tokens.count(0) or 'none'} got none.</p>"
    )


def _reported(result: Result) -> str:
    """What a method says in words of its own, where its rows are not those of solved layers."""
    rows = [row for row in result.record.get("layers") or () if isinstance(row, Mapping) and "error" not in row]
    if not rows:
        return ""
    heads = list(dict.fromkeys(str(key) for row in rows for key in row))
    cells = [[_plain(row.get(head, "")) for head in heads] for row in rows[:MOST_ROWS]]
    return "<h3>What the method reports</h3>" + table("Part by part, in the method's own words", heads, cells)


def _plain(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _layer_table(result: Result, known: list[str]) -> str:
    layers = result.layers
    rows = [
        (each.name, *(number(value_of(each, key)) for key in known), each.note)
        for each in sorted(layers, key=lambda each: (each.depth, each.kind))[:MOST_ROWS]
    ]
    left = f"; {len(layers) - MOST_ROWS:,} more are in the JSON" if len(layers) > MOST_ROWS else ""
    heads = ["layer", *(label_of(result, key) for key in known), "note"]
    return table(f"Every layer{left}", heads, rows, numbers=range(1, len(known) + 1))


# ---- Weights


def _weights(result: Result, at: int, anchor: str, figures: Figures) -> str:
    shown = [each for each in result.views if each.weights is not None]
    if not shown:
        return "<p>The model has no linear layers in blocks.</p>"
    errors = {each.name: value_of(each, "cost") or each.error or each.relative_error or 0 for each in result.layers}
    worst = max(shown, key=lambda each: errors.get(each.name, 0))
    options = "".join(
        f'<option value="{text(each.name)}"{" selected" if each is worst else ""}>{text(each.name)} '
        f"({each.shape[0]} x {each.shape[1]})</option>"
        for each in shown
    )
    left = len(result.views) - len(shown)
    note = f"<p>{left:,} layers nearer to the original are left out.</p>" if left else ""
    drawn = plot(f"{anchor}-weights", f"{anchor}-weights", f"Histogram of the weights of {worst.name}")
    figures[f"{anchor}-weights"] = {"data": [], "layout": {"height": 260}}
    if any(each.error is not None for each in shown):
        figures[f"{anchor}-error"] = {"data": [], "layout": {"height": 260}}
        drawn += plot(f"{anchor}-error", f"{anchor}-error", f"Histogram of the error of {worst.name}")
    else:
        note += (
            '<p class="help muted">With <code>--against ORIGINAL</code> its weights and the errors are shown too.</p>'
        )
    rows = [
        (
            each.name,
            f"{each.shape[0]} x {each.shape[1]}",
            number(each.weights.limit if each.weights else None),
            number(each.relative_error),
        )
        for each in sorted(shown, key=lambda each: -(each.relative_error or 0))[:MOST_ROWS]
    ]
    listed = table(
        "Largest weights and relative errors", ["layer", "shape", "largest |w|", "‖W - Q‖ / ‖W‖"], rows, numbers=(2, 3)
    )
    return (
        f'<h3>Weights of a layer</h3><p class="choice"><label for="{anchor}-layer">Layer </label>'
        f'<select id="{anchor}-layer" data-result="{at}" data-prefix="{anchor}">{options}</select></p>{note}'
        f'<div class="pair">{drawn}</div><p class="muted">Counts on a logarithmic scale.</p>{details("As numbers", listed)}'
    )


# ---- Text


def _text(report: Report, result: Result) -> str:
    if not result.continuations:
        why = "".join(f"<p>{text(note)}</p>" for note in report.notes) or "<p>No texts were written.</p>"
        return f"<h3>What both write</h3>{why}" + _hint(report, "show what both models write")
    parts = []
    for n, each in enumerate(result.continuations, 1):
        first, second = differences(each.original, each.compressed)
        equal = "<p>Both write the same.</p>" if each.original == each.compressed else ""
        parts.append(
            f'<div class="text"><h4>Prompt {n}</h4><blockquote>{text(each.prompt)}</blockquote>{equal}<div class="pair">'
            f'<div><h5>Original</h5><p class="written">{first}</p></div>'
            f'<div><h5>Compressed</h5><p class="written">{second}</p></div></div></div>'
        )
    names = shortened([each.text for each in result.compared])
    passages = "".join(
        table(
            f"Where they differ most on {names[each.text]}",
            ["passage", "KL, nats a token"],
            [
                (Raw(f'<code class="passage">{"".join(map(_marked, p.levels()))}</code>'), number(p.kl))
                for p in each.found.passages
            ],
            numbers=(1,),
        )
        for each in result.compared
    )
    return (
        '<h3>What both write</h3><p class="help">Both always take the likeliest token. Struck out: only the original has it; '
        f"underlined: only the compressed model.</p>{''.join(parts)}<h3>Where predictions differ most</h3>{_LEGEND}{passages}"
    )


_LEGEND = '<p class="help">{}.</p>'.format(
    ", ".join(f'<span class="kl{n}">from {level:g} nats</span>' for n, level in enumerate(LEVELS, 1))
)


def _marked(part: tuple[str, float, int]) -> str:
    """A token of a passage, the stronger marked the more predictions differ for it."""
    said, kl, level = part
    shown = text(json.dumps(said, ensure_ascii=False)[1:-1])
    return f'<span class="kl{level}" title="{kl:.2g} nats">{shown}</span>' if level else shown


# ---- Job and machine


def _run(report: Report, result: Result, anchor: str, figures: Figures) -> str:
    return (
        f"<h3>The job</h3>{_timeline(result, anchor, figures)}<h3>Speed and memory here</h3>{_speed(report, result)}"
        f"<h3>What loads it</h3>{_loaders(result)}<h3>Make it again</h3>{_again(result, anchor)}"
    )


def _timeline(result: Result, anchor: str, figures: Figures) -> str:
    run = result.run
    if not run:
        return "<p>No record of the job is beside the model.</p>"
    figure = timeline_figure(result)
    of = "the GPU's allocator" if run.get("memory_of") == "GPU" else "the process"
    drawn = ""
    if figure is not None:
        figures[f"{anchor}-time"] = figure
        drawn = plot(f"{anchor}-time", f"{anchor}-time", f"Memory that {of} held when each block was finished")
    machine, versions = run.get("machine") or {}, run.get("versions") or {}
    rows = [
        ("finished", run.get("finished", "")),
        ("took", f"{run.get('seconds', 0):.1f} s in {run.get('processes', 1)} process(es)"),
        ("peak memory", f"{megabytes(run.get('peak_memory', 0))} of {of}"),
        (
            "on",
            f"{machine.get('system')}, {machine.get('device')}, {machine.get('threads')} of {machine.get('cores')} threads",
        ),
        ("with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if run.get("resumed_blocks"):
        rows.append(("from an earlier run", f"{run['resumed_blocks']} blocks, whose time is not in it"))
    listed = table("How the job went", ["", ""], rows)
    return f'<div class="pair">{drawn}<div>{listed}</div></div>' if drawn else listed


def _speed(report: Report, result: Result) -> str:
    if result.speed is None:
        return "<p>Not measured: <code>--measure</code> runs the models on this machine.</p>"
    rows = []
    for each in (report.base, result):
        if each is None or each.speed is None:
            continue
        found = each.speed
        rows.append(
            (
                report.label(each),
                f"{found.decode[0]:.1f} ({found.decode[1]:.1f} - {found.decode[2]:.1f})",
                f"{found.prefill[0]:.0f} ({found.prefill[1]:.0f} - {found.prefill[2]:.0f})",
                megabytes(found.memory),
                "" if found.weight_bytes is None else megabytes(found.weight_bytes),
                "" if found.share is None else f"{found.share:.0%}",
                found.engine,
            )
        )
    heads = ["", "new tokens/s", "prompt tokens/s", "peak memory", "read a token", "of the bandwidth", "engine"]
    found = result.speed
    cached = (
        " Above 100 % the weights are read from the processor's caches, which are faster than memory."
        if any(
            each is not None and each.speed is not None and (each.speed.share or 0) > 1
            for each in (report.base, result)
        )
        else ""
    )
    routed = " A mixture of experts reads some of them a token, so it has no share." if found.share is None else ""
    return table(
        f"{found.prompt_tokens} prompt and {found.new_tokens} new tokens on {found.where}: medians, and the middle half",
        heads,
        rows,
        numbers=(1, 2, 3, 4, 5),
    ) + (
        f"<p>A copy of memory moves {found.bandwidth / 1e9:.1f} GB/s here. The share is what reading the weights once a token "
        f"takes of that.{cached}{routed}</p>"
    )


def _loaders(result: Result) -> str:
    classes = {TESTED: "tested", REFUSED: "refused"}
    rows = [
        (each.engine, Raw(f'<span class="{classes.get(each.state, "muted")}">{text(each.state)}</span>'), each.how)
        for each in result.loaders
    ]
    return table("Engines that know the format; `tested`: seen to load such a checkpoint", ["engine", "", "how"], rows)


def _again(result: Result, anchor: str) -> str:
    command = result.run.get("command")
    if not isinstance(command, str):
        return "<p>No command says it: it was made by a program, or the job's record is not there.</p>"
    recipe = result.run.get("recipe")
    file = f"<p>with this in recipe.yaml (JSON is YAML too):</p><pre>{text(json.dumps(recipe))}</pre>" if recipe else ""
    return (
        f'<pre id="{anchor}-command">{text(command)}</pre>'
        f'<p class="choice"><button type="button" data-copy="{anchor}-command">Copy</button></p>{file}'
    )
