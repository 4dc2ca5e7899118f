"""Gather what a report says: what the jobs kept, and what is measured now."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.lazy_model import LazyModel, lazily
from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.room import RUN_FILE, read_object, record_of
from tersor.checkpoint.source import Checkpoint, open_checkpoint
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.divergence import Divergence, divergence
from tersor.evaluate.loaders import loaders_of
from tersor.evaluate.perplexity import why_not_causal
from tersor.evaluate.sizes import sizes_of
from tersor.evaluate.weight_view import LayerView, layer_views, place_of
from tersor.progress import Progress, silent
from tersor.report.data import Compared, Continuation, Layer, Report, Result
from tersor.report.measure import continuations, measure_speed, prompts_from
from tersor.untrusted import read_json_object
from tersor.version import __version__

KEPT = ("total_kl", "total_half_width", "text", "by", "measure", "samples", "left")  # of an attribution


def collect(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    texts: Sequence[str] = (),
    prompts: Sequence[str] = (),
    attributions: Sequence[Path] = (),
    measure: bool = False,
    seq_len: int = 512,
    max_windows: int = 16,
    max_new_tokens: int = 48,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> Report:
    """A report on models, each a directory.

    against: the original, with which the weights are compared, and the predictions where it is a language model with a
    tokenizer: on `max_windows` windows of `seq_len` tokens of each of `texts` (the built-in one where none is given), and by what
    both write after `prompts` (beginnings of parts of the text where none is given). attributions: files of `tersor attribute`.
    measure: run all models here. Raises TersorError where one is no model, or the original is another architecture.
    """
    if not models:
        raise TersorError("there is nothing to report on: give the directory of a result")
    names = [str(each) for each in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TersorError(f"{twice} is given twice")
    if (texts or prompts) and against is None:
        raise TersorError("--text and --prompt compare with the original: name it with --against")
    attributed = _attributions(attributions, names)
    opened = {name: open_checkpoint(name) for name in names}
    original = None if against is None else lazily(against)
    results = [_kept(lazily(each), original, attributed.get(name), progress) for name, each in opened.items()]
    base = None if original is None else _kept(original, None, None, progress)
    notes: list[str] = []
    if original is not None:
        reason = _no_language_model(original)
        if reason is not None:
            if texts or prompts:
                raise TersorError(f"--text and --prompt are for language models: {reason}")
            notes.append(f"Predictions are not compared: {reason}.")
        else:
            how: dict[str, Any] = {"seq_len": seq_len, "max_windows": max_windows, "dtype": dtype, "device": device}
            compared = _compared(opened, original.checkpoint, texts or ["builtin"], how, progress)
            given = list(prompts) or prompts_from(original.checkpoint, texts[0] if texts else "builtin")
            written = continuations(
                {str(against): original.checkpoint} | opened, given, max_new_tokens, dtype, device, progress
            )
            results = [
                dataclasses.replace(
                    each,
                    compared=compared[each.name],
                    continuations=[
                        Continuation(prompt, first, second)
                        for prompt, first, second in zip(given, written[str(against)], written[each.name], strict=True)
                    ],
                )
                for each in results
            ]
    if measure:
        every = [each for each in (base, *results) if each is not None]
        speeds = measure_speed({each.name: each.sizes for each in every}, dtype, device, progress)
        results = [dataclasses.replace(each, speed=speeds[each.name]) for each in results]
        base = None if base is None else dataclasses.replace(base, speed=speeds[base.name])
    return Report(
        results=results,
        base=base,
        machine={
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        notes=notes,
    )


def _kept(
    model: LazyModel, against: LazyModel | None, attributed: Mapping[str, Any] | None, progress: Progress
) -> Result:
    """What a model's directory says, and its weights beside the original's."""
    name, directory, config = str(model.checkpoint), model.checkpoint.directory, model.checkpoint.config
    record, run = record_of(directory) or {}, read_object(directory / RUN_FILE) or {}
    sizes = sizes_of(model)
    views = layer_views(model, against, progress=progress)
    return Result(
        name=name,
        architecture=str((config.get("architectures") or [config.get("tersor_model", "unknown")])[0]),
        record={key: value for key, value in record.items() if key not in ("files", "blocks")},
        run=run,
        sizes=sizes,
        layers=_layers(name, record, run, sizes.layers, views, attributed),
        views=views,
        loaders=loaders_of(model.checkpoint),
        attributed=None if attributed is None else {key: attributed.get(key) for key in KEPT},
    )


def _layers(
    name: str,
    record: Mapping[str, Any],
    run: Mapping[str, Any],
    bits: Mapping[str, float],
    views: Sequence[LayerView],
    attributed: Mapping[str, Any] | None,
) -> list[Layer]:
    """Every linear map of the blocks and every other layer that the job solved, with all that is known of it. After them come
    the blocks and groups of layers that an attribution measured together, a row each."""
    rows = {
        str(row["name"]): row
        for row in record.get("layers") or ()
        if isinstance(row, dict) and "name" in row and isinstance(row.get("error"), int | float)
    }
    seen = {each.name: each for each in views}
    seconds = run.get("layer_seconds") if isinstance(run.get("layer_seconds"), dict) else {}
    names = list(dict.fromkeys([*seen, *rows]))
    costs, together = _costs(name, attributed, names) if attributed is not None else ({}, [])
    places = {each: place_of(each) for each in [*names, *(_first(row) for row in together)]}
    depths = {place: n for n, place in enumerate(sorted({place for place, _ in places.values()}))}
    found = []
    for each in names:
        row, cost, place = rows.get(each, {}), costs.get(each, {}), places[each]
        view = seen.get(each)
        found.append(
            Layer(
                name=each,
                depth=depths[place[0]],
                kind=place[1],
                bits=bits.get(each),
                error=_number(row.get("error")),
                damp=_number(row.get("damp")),
                condition=_number(row.get("condition")),
                tokens=row["tokens"] if isinstance(row.get("tokens"), int) else None,
                seconds=_number((seconds or {}).get(each)),
                note=str(row.get("note") or ""),
                relative_error=None if view is None else view.relative_error,
                kl=_number(cost.get("kl")),
                kl_half_width=_number(cost.get("half_width")),
                restored=_number(cost.get("restored")),
            )
        )
    for cost in together:
        found.append(
            Layer(
                name=str(cost["name"]),
                depth=depths[places[_first(cost)][0]],
                kind=str(cost.get("kind") or "block"),
                note=f"{n} modules measured together" if (n := len(cost.get("members") or ())) > 1 else "",
                kl=_number(cost.get("kl")),
                kl_half_width=_number(cost.get("half_width")),
                restored=_number(cost.get("restored")),
            )
        )
    return found


def _first(row: Mapping[str, Any]) -> str:
    """The name of a group's first module, which says where the group is: "a.q_proj + k_proj" is where a.q_proj is."""
    return str(row["name"]).partition(" + ")[0]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _attributions(files: Sequence[Path], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{model: what `tersor attribute` found of it}. One file and one model belong together, whatever the file says."""
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        content = read_json_object(path)
        rows = content.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
            raise TersorError(f"{path} is no attribution: it has no list of rows, each with a name")
        said = str(content.get("model"))
        same = [name for name in names if Path(name).resolve() == Path(said).resolve()]
        owner = same[0] if same else names[0] if len(names) == len(files) == 1 else None
        if owner is None:
            raise TersorError(f"{path} is the attribution of {said}, which is none of {', '.join(names)}")
        if owner in found:
            raise TersorError(f"{path} is a second attribution of {owner}; give one")
        found[owner] = content
    return found


def _costs(
    name: str, attributed: Mapping[str, Any], known: Sequence[str]
) -> tuple[dict[str, Mapping[str, Any]], list[Mapping[str, Any]]]:
    """{layer: its row}, and the rows of blocks and of layers that were exchanged together.

    No cost is counted twice: a block is left out where one of its layers has a row. Raises TersorError where no row is the
    model's.
    """
    costs: dict[str, Mapping[str, Any]] = {}
    together: list[Mapping[str, Any]] = []
    mine, inside = False, set[str]()
    for row in attributed["rows"]:
        members = _members(row, known)
        mine = mine or bool(members)
        inside |= members
        if row["name"] in known and len(row.get("members") or ()) < 2:
            costs[row["name"]] = row
        elif row.get("kl") or row.get("restored") or attributed.get("by") == "block":
            together.append(row)
    for row in attributed.get("blocks") or ():
        members = _members(row, known)
        mine = mine or bool(members)
        if not members & inside and row["name"] not in known:
            together.append(row)
    if not mine:
        raise TersorError(f"the attribution names no layer of {name}: it was made of another model")
    return costs, together


def _members(row: Mapping[str, Any], known: Sequence[str]) -> set[str]:
    """What a row is of: its members, or the known layers below its name where it lists none."""
    name = row["name"]
    listed = {str(each) for each in row.get("members") or () if any(f"{k}.".startswith(f"{each}.") for k in known)}
    return listed or {each for each in known if f"{each}.".startswith(f"{name}.")}


def _no_language_model(model: LazyModel) -> str | None:
    """Why predictions cannot be compared, or None."""
    if load_tokenizer(model.checkpoint.directory) is None:
        return f"{model.checkpoint} has no tokenizer"
    return why_not_causal(model.module)


def _compared(
    models: Mapping[str, Checkpoint], against: Checkpoint, texts: Sequence[str], how: dict[str, Any], progress: Progress
) -> dict[str, list[Compared]]:
    """Each model with the original on each text. The original is loaded once, and its noise floor on a text found once."""
    tokenizer = load_tokenizer(against.directory)
    base = load(against, dtype=how["dtype"], device=how["device"])
    found: dict[str, list[Compared]] = {name: [] for name in models}
    for text in texts:
        floor: float | None = None
        for n, (name, model) in enumerate(models.items()):

            def tell(what: str, done: int, total: int, name: str = name) -> None:
                progress(f"{name}: {what}", done, total)

            source = text if text == "builtin" else Path(text)
            each: Divergence = divergence(
                model, base, source, tokenizer=tokenizer, noise_floor=n == 0, progress=tell, **how
            )
            floor = each.noise_floor if n == 0 else floor
            found[name].append(Compared(text, dataclasses.replace(each, noise_floor=floor)))
    return found
