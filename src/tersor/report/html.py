"""Pieces of HTML. Whatever comes from a model, a text or a file is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape


def text(value: object) -> str:
    return escape(str(value))


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table whose first column names its rows. numbers: the columns that are set as numbers. Cells are text, but for `Raw`."""
    kind = ["number" if n in numbers else "" for n in range(len(heads))]
    top = "".join(f'<th scope="col"{_class(k)}>{text(head)}</th>' for head, k in zip(heads, kind, strict=True))
    body = []
    for row in rows:
        cells = [f'<th scope="row">{_cell(row[0])}</th>']
        cells += [f"<td{_class(k)}>{_cell(cell)}</td>" for cell, k in zip(row[1:], kind[1:], strict=True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


class Raw(str):
    """HTML that is to stand as it is."""


def _cell(value: object) -> str:
    return str(value) if isinstance(value, Raw) else text(value)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def plot(identity: str, figure: str, label: str, *, links: bool = False) -> str:
    """The place of a plot. label: its caption, which also stands for it where it cannot be seen."""
    more = ' data-links="yes"' if links else ""
    return (
        f'<figure><div role="img" aria-label="{text(label)}"><div class="plot" id="{identity}" data-figure="{figure}"{more}>'
        f"</div></div><figcaption>{text(label)}</figcaption></figure>"
    )


def details(summary: str, inside: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def differences(first: str, second: str) -> tuple[str, str]:
    """Two texts, with the words that only one of them has marked: <del> in the first, <ins> in the second."""
    a, b = _words(first), _words(second)
    left, right = [], []
    for kind, i, j, k, n in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            left.append(text("".join(a[i:j])))
            right.append(text("".join(b[k:n])))
            continue
        if j > i:
            left.append(f"<del>{text(''.join(a[i:j]))}</del>")
        if n > k:
            right.append(f"<ins>{text(''.join(b[k:n]))}</ins>")
    return "".join(left), "".join(right)


def _words(value: str) -> list[str]:
    """Words, spaces and signs, which joined are the text."""
    return re.findall(r"\s+|\w+|[^\w\s]", value)


def megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
