"""The report as one HTML file: text and tables are in it as they are, plots are drawn by plotly.js, which is in it too.

A content security policy in the page forbids every request, so nothing leaves it, whatever is in it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.files import replacing
from tersor.report.data import ELEMENT, Report, embedded
from tersor.report.figures import frontier, frontier_figure, loss_of
from tersor.report.html import Raw, megabytes, number, plot, table, text
from tersor.report.sections import result_section

GENERATOR = '<meta name="generator" content="tersor report">'
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write_page(report: Report, path: Path) -> None:
    """Write the page. Raises TersorError where a file is there that is no report, or plotly is not installed."""
    check_page(path)
    page = page_of(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def check_page(path: Path) -> None:
    """Raise TersorError where no page can be written: before anything is computed."""
    if path.is_dir():
        raise TersorError(f"{path} is a directory; give a file such as {path / 'report.html'}")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if GENERATOR not in file.read(4096):
                raise TersorError(f"{path} is no report of tersor's and would be lost; give another --out")
    _plotly()


def _plotly() -> tuple[str, str]:
    """plotly.js and its version."""
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise TersorError("a report needs plotly: pip install 'tersor[report]'") from None
    return get_plotlyjs(), get_plotlyjs_version()


def page_of(report: Report) -> str:
    """The whole page."""
    script, version = _plotly()
    figures: dict[str, Any] = {}
    anchors = [f"result-{n + 1}" for n in range(len(report.results))]
    sections = [result_section(report, n, anchor, figures, level=2) for n, anchor in enumerate(anchors)]
    several = _several(report, anchors, figures) if len(report.results) > 1 else ""
    title = ", ".join(report.label(each) for each in report.results)
    base = "" if report.base is None else f" beside {text(report.label(report.base))}"
    assets = files("tersor") / "report"
    style, own = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    notes = "".join(f"<p>{text(note)}</p>" for note in report.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tersor report: {text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header>
<div><h1>{text(title)}{base}</h1>
<p class="muted">Report of {text(report.made.replace("T", " ").replace("+00:00", " UTC"))} by tersor {text(report.version)} on
{text(report.machine["system"])}, {text(report.machine["device"])}</p></div>
<button id="theme" class="switch" type="button" aria-pressed="false">Dark</button>
</header>
<main id="main">
{notes}{several}
{"".join(sections)}
</main>
<footer>
<p>This page holds all that it shows and sends no request. Its data is the JSON in <code>#{ELEMENT}</code>, which
<code>tersor.report.read(file)</code> gives back. Plots: plotly.js {text(version)}, Copyright 2012-2026 Plotly, Inc.,
MIT licence, embedded from the Python package plotly.</p>
</footer>
<script type="application/json" id="{ELEMENT}">{embedded(report.as_dict())}</script>
<script type="application/json" id="figures">{embedded(figures)}</script>
<script>{script}</script>
<script>
{own}</script>
</body>
</html>
"""


def _several(report: Report, anchors: list[str], figures: dict[str, Any]) -> str:
    """All results beside each other: the frontier of size and loss, and a table with links."""
    losses = [loss_of(each) for each in report.results]
    known = [n for n, loss in enumerate(losses) if loss is not None]
    points = [(float(report.results[n].sizes.files), loss) for n, loss in enumerate(losses) if loss is not None]
    best = {known[n] for n in frontier(points)}
    drawn = ""
    figure = frontier_figure(report, anchors)
    if figure is not None:
        figures["frontier"] = figure
        label = (
            "Size and loss of each result; larger points are faster where speed was measured. The dotted line joins those to "
            "which none is better in both. A click leads to the result."
        )
        drawn = plot("frontier", "frontier", label, links=True)
    rows = [
        (
            Raw(f'<a href="#{anchor}">{text(report.label(each))}</a>'),
            str((each.record.get("method") or {}).get("name", "")),
            megabytes(each.sizes.files),
            number(each.sizes.packed_bits),
            number(loss),
            "" if each.speed is None else f"{each.speed.decode[0]:.1f}",
            "yes" if n in best else "",
        )
        for n, (each, anchor, loss) in enumerate(zip(report.results, anchors, losses, strict=True))
    ]
    heads = ["result", "method", "on disk", "bits a packed weight", "KL, nats", "tokens a second", "on the frontier"]
    listed = table("The results; each name leads to its own part.", heads, rows, numbers=(2, 3, 4, 5))
    return f'<section aria-labelledby="several"><h2 id="several">All results</h2>{drawn}{listed}</section>'
