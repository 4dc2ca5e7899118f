"""The pages that are made from the source when the documentation is built: one for every method and every model.

A hook of MkDocs, named in mkdocs.yml. A page is the docstring of the file that holds the class or classes, and a table: of a
method's options, or of a model's variants.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any

from tersor import models
from tersor.methods.method import BlockMethod, Method, ModelMethod, PackedMethod, methods

WAYS = {
    BlockMethod: "block by block",
    ModelMethod: "on the whole model",
    PackedMethod: "on a packed model beside its original",
}


def pages() -> dict[str, str]:
    """Markdown by the page's path, such as methods/gptq.md."""
    by_module: dict[str, list[type[Method]]] = defaultdict(list)
    for kind in methods().values():
        by_module[kind.__module__].append(kind)
    made = {f"methods/{_stem(module)}.md": _page(module, *map(_options, kinds)) for module, kinds in by_module.items()}
    variants: dict[str, list[models.ModelInfo]] = defaultdict(list)
    for info in models.list():
        variants[info.module].append(info)
    for module, infos in variants.items():
        made[f"models/{infos[0].family}/{_stem(module)}.md"] = _page(module, _variants(infos))
    made["methods/index.md"] = _methods_index(by_module)
    made["models/index.md"] = _models_index(variants)
    return made


def _methods_index(by_module: dict[str, list[type[Method]]]) -> str:
    rows = ["| method | | works |", "| --- | --- | --- |"]
    for module, kinds in by_module.items():
        for kind in kinds:
            what = _escaped((kind.__doc__ or "").partition("\n")[0])
            way = next(said for base, said in WAYS.items() if issubclass(kind, base))
            rows.append(f"| [`{kind.name}`]({_stem(module)}.md) | {what} | {way} |")
    return "# Methods\n\n" + "\n".join(rows) + "\n"


def _models_index(variants: dict[str, list[models.ModelInfo]]) -> str:
    """One table a family: what each architecture is for, its sizes, its paper."""
    families: dict[str, list[str]] = defaultdict(list)
    for module, infos in variants.items():
        for system, group in groupby(infos, key=lambda info: info.system):
            members = list(group)
            sizes = [info.parameters for info in members]
            span = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
            link = f"[`{system}`]({members[0].family}/{_stem(module)}.md)"
            row = f"| {link} | {members[0].task} | {members[0].input} | {len(members)} | {span} | {members[0].paper} |"
            families[members[0].family].append(row)
    head = "| architecture | task | input | variants | parameters | paper |\n| --- | --- | --- | ---: | ---: | --- |"
    parts = [f"## {family.capitalize()}\n\n{head}\n" + "\n".join(rows) for family, rows in families.items()]
    note = "A model of transformers needs no file here: it is loaded, compressed and run by its own config."
    return "# Models\n\n" + "\n\n".join([note, *parts]) + "\n"


def on_config(config: Any) -> Any:
    """Put the pages into the navigation, in front of its last part."""
    found = sorted(pages())
    families: dict[str, list[str]] = defaultdict(list)
    for path in found:
        if path.startswith("models/") and path != "models/index.md":
            families[path.split("/")[1].capitalize()].append(path)
    listed = [{family: _entries(paths)} for family, paths in families.items()]
    methods = [path for path in found if path.startswith("methods/") and path != "methods/index.md"]
    config.nav[-1:-1] = [
        {"Methods": ["methods/index.md", *_entries(methods)]},
        {"Models": ["models/index.md", *listed]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def _page(module: str, *tables: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return "\n\n".join([f"# {_stem(module)}", as_markdown(docstring), *tables]) + "\n"


def as_markdown(docstring: str) -> str:
    """Indented lines are code in Markdown too; elsewhere what it would take for markup is plain text."""
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in docstring.splitlines())


def _escaped(line: str) -> str:
    bullet = re.match(r"[*-] ", line)
    start = bullet.end() if bullet else 0
    parts = line[start:].split("`")  # every second one is a code span
    parts[::2] = [re.sub(r"([*<>\[\]|_])", r"\\\1", part) for part in parts[::2]]
    return line[:start] + "`".join(parts)


def _options(kind: type[Method]) -> str:
    verbs = [
        f"tersor compress {kind.name}",
        *([f"tersor quantize --method {kind.name}"] if issubclass(kind, BlockMethod) else []),
    ]
    rows = ["| option | | default | allowed |", "| --- | --- | --- | --- |"]
    for each in dataclasses.fields(kind):
        about = {key: _escaped(str(each.metadata.get(key) or "")) for key in ("help", "allowed")}
        default = "not set" if each.default is None else f"`{each.default}`"
        rows.append(f"| `{each.name}` | {about['help']} | {default} | {about['allowed']} |")
    return (
        f"## Options\n\nOf {' and '.join(f'`{each}`' for each in verbs)} and of `{kind.__name__}(...)`.\n\n"
        + "\n".join(rows)
    )


def _variants(infos: list[models.ModelInfo]) -> str:
    rows = [
        "| name | parameters | task | input | `torch.export`, `torch.compile` in one graph |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for info in infos:
        traced = f"no: {_escaped(info.untraceable)}" if info.untraceable else "yes"
        rows.append(f"| `{info.name}` | {info.parameters:,} | {info.task} | {info.input} | {traced} |")
    return "## Variants\n\nFor `tersor.models.create` and `load`.\n\n" + "\n".join(rows)


def _entries(paths: Any) -> list[dict[str, str]]:
    return [{Path(path).stem: path} for path in paths]


def _stem(module: str) -> str:
    return module.rpartition(".")[2]
