"""Tables as plain text: within the width there is, no cell cut, no blank at the end of a line.

A row that is wider than the terminal (a file has 80 columns, or as many as COLUMNS says) is told in two lines: what it is
about, and below it the rest. Where only notes are too wide, a last column without a heading, each goes below its own row.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence

import typer

from tersor.untrusted import printable

GAP = "  "
NARROWEST = 24  # columns of a text that is wrapped within its own column


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)) -> None:
    for line in table(head, rows, left=left):
        typer.echo(line)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,), width: int | None = None
) -> list[str]:
    """The lines of a table. The columns `left` hold text, the others numbers; a last column of text is wrapped to fit."""
    width = shutil.get_terminal_size().columns if width is None else width
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    found = _aligned(cells, left, width)
    if found is None and not head[-1] and len(head) - 1 in left:  # notes: few rows have one, which goes below its row
        found = _aligned([row[:-1] for row in cells], set(left) - {len(head) - 1}, width)
        for lines, row in zip(found or [], cells, strict=False):
            lines += textwrap.wrap(GAP + row[-1], width, subsequent_indent=GAP, break_on_hyphens=False)
    if found is None:
        names, rest = [row[0] for row in cells], [row[1:] for row in cells]
        below = _aligned(rest, {column - 1 for column in left}, width - len(GAP))
        if below is None:
            below = [[], *(_told(cells[0][1:], row, width - len(GAP)) for row in rest[1:])]
        found = [
            [*_name(name, width), *(GAP + line for line in lines)] for name, lines in zip(names, below, strict=True)
        ]
    return [line.rstrip() for lines in found for line in lines]


def wrapped(lines: Iterable[str], *, indent: int = 4) -> list[str]:
    """Lines that keep within the terminal: what is too long goes on below, indented."""
    width = shutil.get_terminal_size().columns
    found: list[str] = []
    for line in lines:
        own = " " * (len(line) - len(line.lstrip()))
        found += textwrap.wrap(
            printable(line),
            width,
            subsequent_indent=own + " " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return found


def _aligned(rows: list[list[str]], left: Collection[int], width: int) -> list[list[str]] | None:
    """The lines of each row; None where they would be wider than `width`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    room = width - sum(widths[:-1]) - len(GAP) * last
    wraps = last in left and widths[-1] > 0 and room >= min(widths[-1], NARROWEST)
    if wraps:
        widths[-1] = min(widths[-1], room)
    if not wraps and widths[-1] > room:
        return None
    found = []
    for row in rows:
        ends = textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False) if wraps else [row[-1]]
        lines = []
        for number, end in enumerate(ends or [""]):
            line = [*(row[:-1] if number == 0 else [""] * last), end]
            lines.append(
                GAP.join(
                    c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))
                )
            )
        found.append(lines)
    return found


def _name(name: str, width: int) -> list[str]:
    """What a row is about, on lines of its own. Only a sentence is wrapped: a path stays whole."""
    if len(name) <= width:
        return [name] if name else []
    return textwrap.wrap(name, width, subsequent_indent=GAP * 2, break_long_words=False, break_on_hyphens=False)


def _told(head: list[str], row: list[str], width: int) -> list[str]:
    """A row as `heading value` one after another, where even two lines are too narrow for its columns."""
    told = ", ".join(f"{name} {value}".strip() for name, value in zip(head, row, strict=True) if value)
    return textwrap.wrap(told, width, break_on_hyphens=False)
