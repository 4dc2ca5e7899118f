"""The table, the curves and their picture of what `sequence_proofs.py` trained and gathered.

python benchmarks/sequence_proofs_table.py FOLDER            prints the table
python benchmarks/sequence_proofs_table.py FOLDER --write    and keeps it with curves and picture, beside what is kept of others
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import sequence_proofs
from common import RESULTS, kept_numbers, write_numbers, write_table
from sequence_proofs import LONG, PARITY_STEPS, PROOFS, REGRESSION_STEPS, REGRESSIONS, SHORT
from sequence_proofs_data import LENGTH, LISTOPS, LISTOPS_LENGTH, PATHFINDER


def table(rows: list[dict[str, Any]]) -> str:
    """One table for each proof that has rows, with its goal."""
    made = (
        (_life_table, _of(rows, "lifegpt")),
        (_chain_table, _of(rows, "cot-")),
        (_regression_table, _of(rows, "regression/")),
        (_parity_table, _of(rows, "parity/")),
        (_arena_table, _of(rows, "listops/", "image/", "pathfinder/")),
    )
    return "\n".join(line for make, mine in made if mine for line in make(mine))


def _of(rows: list[dict[str, Any]], *prefixes: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].startswith(prefixes)]


def _heading(title: str, *columns: str) -> list[str]:
    names = ("", "on", "seed", "parameters", "steps", "samples", *columns)
    return ["", f"### {title}", "", f"| {' | '.join(names)} |", "| --- | --- |" + " ---: |" * (len(names) - 2)]


def _line(row: dict[str, Any], *values: str) -> str:
    name = row["name"].partition("/")[2] or row["name"]
    samples = row["steps"] * row["batch"]
    cells = (
        name,
        row["where"].split(",")[0],
        row["seed"],
        f"{row['parameters']:,}",
        f"{row['steps']:,}",
        f"{samples:,}",
        *values,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _met(found: bool) -> str:
    return "met" if found else "missed"


def _life_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = _heading(
        "Game of Life, 8 x 8, unseen boards of all densities", "cells right", "wrong cells", "of", "goal 99.99 %"
    )
    for row in rows:
        scores = row["scores"]
        counts = (f"{scores['wrong cells']:,.0f}", f"{scores['cells']:,.0f}")
        lines.append(_line(row, _percent(scores["cells right"], 4), *counts, _met(scores["cells right"] >= 0.9999)))
    if rows:
        tenths = {name[-10:]: value for name, value in rows[0]["scores"].items() if "density" in name}
        lines += [
            "",
            "| share of live cells |" + "".join(f" {name} |" for name in tenths),
            "| --- |" + " ---: |" * len(tenths),
        ]
        for row in rows:
            found = [value for name, value in row["scores"].items() if "density" in name]
            lines.append(f"| seed {row['seed']} |" + "".join(f" {_percent(each, 3)} |" for each in found))
    return lines


def _chain_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = _heading(f"Arithmetic with {LENGTH} operators, unseen questions", "right", "goal", "")
    for row in rows:
        right, chain = row["scores"]["accuracy"], row["name"] == "cot-chain"
        goal = ("99 % or more", right >= 0.99) if chain else ("40 % or less", right <= 0.4)
        named = {**row, "name": "chain of thought" if chain else "direct answer"}
        lines.append(_line(named, _percent(right, 2), goal[0], _met(goal[1])))
    return lines


def _regression_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = _heading("Regression in context: squared error over that of the answer 0", "all answers", "second half")
    for row in rows:
        lines.append(_line(row, *(f"{row['scores'][name]:.4f}" for name in ("error, all", "error, second half"))))
    errors = {row["name"]: row["scores"]["error, all"] for row in rows}
    ahead = [
        kind
        for kind in REGRESSIONS
        if errors.get(f"regression/{kind}/algoformer", math.inf) < errors.get(f"regression/{kind}/plain_transformer", 0)
    ]
    goal = f"AlgoFormer ahead of the plain transformer: {', '.join(ahead) or 'nowhere'}. Goal (everywhere): "
    return [*lines, "", goal + _met(len(ahead) == len(REGRESSIONS)) + ".", *_stopped(rows, REGRESSION_STEPS)]


def _stopped(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """Which of the trainings with a fixed number of steps ended before it. On a CPU the number was given by hand (--steps)."""
    names = [
        row["name"].partition("/")[2] for row in rows if row["steps"] < steps and row["where"].startswith("NVIDIA")
    ]
    said = f"Stopped before their {steps:,} steps, because their seconds were over, with the rate still high"
    return ["", f"{said}, so these say what so many steps teach and no more: {', '.join(names)}."] if names else []


def _parity_table(rows: list[dict[str, Any]]) -> list[str]:
    names = (f"places 1 to {SHORT}", f"places {SHORT + 1} to {LONG}", f"place {LONG}")
    lines = _heading(f"Parity, trained on {SHORT} bits: answers right", *names)
    lines += [_line(row, *(_percent(row["scores"][name]) for name in names)) for row in rows]
    return lines + _stopped(rows, PARITY_STEPS)


def _arena_table(rows: list[dict[str, Any]]) -> list[str]:
    scale = (
        f"{LISTOPS:,} ListOps of {LISTOPS_LENGTH // 4 + 1} to {LISTOPS_LENGTH - 1} tokens, {PATHFINDER:,} Pathfinders"
    )
    lines = _heading(f"Long Range Arena: {scale}", "pretraining steps", "accuracy")
    for row in rows:
        before = row["scores"].get("steps of pretraining", 0)
        named = {**row, "name": row["name"].replace("/", " ")}
        lines.append(_line(named, f"{before:,.0f}" if before else "", _percent(row["scores"]["accuracy"])))
    right = {row["name"]: row["scores"]["accuracy"] for row in rows}
    plain, pretrained = right.get("listops/transformer"), right.get("listops/transformer + SPT")
    if plain is not None and pretrained is not None:
        lift = 100 * (pretrained - plain)
        lines += ["", f"SPT changes the transformer by {lift:+.1f} points. Goal (+10): {_met(lift >= 10)}."]
    return lines


def write(folder: Path, command: str) -> None:
    """The kept table with its rows, the curves (at most 100 places each) and their picture; a training that was kept before and
    is not in `folder` stays."""
    before = kept_numbers("sequence_proofs")
    found = json.loads((folder / "rows.json").read_text())
    by_name = {(row["name"], row["seed"]): row for row in [*before.get("rows", []), *found]}
    order = list(PROOFS)
    rows = sorted(by_name.values(), key=lambda row: (order.index(row["name"]), row["seed"]))
    made = f"`python benchmarks/sequence_proofs.py {command}`; {found[0]['where']}"
    runs = list(dict.fromkeys([*before.get("runs", []), made]))

    curves, new = _read(RESULTS / "sequence_proofs.csv"), _read(folder / "curves.csv")
    again = {line["training"] for line in new}
    kept = [line for line in curves if line["training"] not in again]
    for training in dict.fromkeys((line["training"], line["part"]) for line in new):
        mine = [line for line in new if (line["training"], line["part"]) == training]
        every = math.ceil(len(mine) / 100)
        kept += [line for at, line in enumerate(mine) if at % every == 0 or line["validation"] or at == len(mine) - 1]
    with (RESULTS / "sequence_proofs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    _picture(kept, Path(__file__).parents[1] / "docs" / "images" / "sequence-proofs.png")

    about = (sequence_proofs.__doc__ or "").split("\n\n", 2)[2].strip()
    text = ["# What the sequence models learn", "", about, table(rows), ""]
    if missing := [name for name in PROOFS if all(row["name"] != name for row in rows)]:
        text += [f"Not trained to their end yet: {'; '.join(missing)}.", ""]
    text += [f"- {run}" for run in runs]
    text += ["", "Curves in sequence_proofs.csv, drawn in docs/images/sequence-proofs.png"]
    write_table("sequence_proofs", "\n".join(text))
    write_numbers("sequence_proofs", {"rows": rows, "runs": runs})


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _picture(curves: list[dict[str, Any]], path: Path) -> None:
    """The loss of every training over its steps."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = {
        "Game of Life": "lifegpt",
        "chains of thought": "cot-",
        **{f"regression, {kind}": f"regression-{kind}-" for kind in REGRESSIONS},
        "parity": "parity-",
        "ListOps": "listops-",
        "Image": "image-",
        "Pathfinder": "pathfinder-",
    }
    groups = {key: each for key, each in groups.items() if any(line["training"].startswith(each) for line in curves)}
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 3.5 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (title, prefix) in zip(axes.flat, groups.items(), strict=False):
        for name in dict.fromkeys(line["training"] for line in curves if line["training"].startswith(prefix)):
            mine = [line for line in curves if line["training"] == name and line["part"] != "pretraining"]
            label = name.removeprefix(prefix).rpartition("-")[0].replace("_", " ") or title
            (drawn,) = axis.plot(*_points(mine, "loss"), label=label, linewidth=1)
            if any(line["validation"] for line in mine):
                axis.plot(*_points(mine, "validation"), "--", color=drawn.get_color(), linewidth=1)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def _points(lines: list[dict[str, Any]], column: str) -> tuple[list[int], list[float]]:
    found = [(int(line["step"]), float(line[column])) for line in lines if line[column]]
    return [step for step, _ in found], [value for _, value in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--command", default="all FOLDER --seconds 660", help="with --write: how the rows were made")
    asked = parser.parse_args()
    print(table(json.loads((asked.folder / "rows.json").read_text())))
    if asked.write:
        write(asked.folder, asked.command)


if __name__ == "__main__":
    main()
