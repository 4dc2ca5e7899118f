"""What the documentation says is true: its code blocks run, its tables and messages are those of the code.

Every fenced `python` and `bash` block of README.md, CONTRIBUTING.md and docs/ is run; those of one page one after another, in
one directory and one namespace. A block that cannot run has `<!-- not run: REASON -->` on the line before it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from forked import tersor_program

from tersor import models
from tersor.cli.main import VERBS, app, main
from tersor.methods.method import methods

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: \S[^\n]*-->\n)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text[: found.start("code")].count("\n"))
        for found in FENCE.finditer(text)
        if not found["skip"] and found["language"] in ("python", "bash")
    ]


@contextlib.contextmanager
def programs_of(folder: Path) -> Iterator[dict[str, str]]:
    """An environment in which `tersor` and `python` are the ones under test. folder: where they are put."""
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    source = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tersor_program(folder):
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, "PATH": path, "PYTHONPATH": source, "COLUMNS": "120"}


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with programs_of(tmp_path_factory.mktemp("bin")) as found:
        yield found


def run_page(page: Path, terminal: dict[str, str], namespace: dict[str, Any]) -> None:
    """Run a page's blocks in the working directory. Fails at the first that ends with an error."""
    for block in blocks_of(page):
        where = f"{page.name}:{block.line + 1}"
        if block.language == "python":
            # The padding makes a traceback name the page's own line.
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), namespace)
            continue
        lines = block.code.splitlines()
        if all(line.startswith("tersor ") and not set(line) & set("|>;&$") for line in lines):
            for line in lines:
                with pytest.raises(SystemExit) as ended:  # in this process: a fresh one takes seconds to import torch
                    main(shlex.split(line)[1:])
                assert ended.value.code == 0, f"{where}: {line}"
        else:
            shell = ["bash", "-euo", "pipefail", "-c", block.code]
            done = subprocess.run(shell, env=terminal, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, terminal: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    namespace = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", namespace)
    monkeypatch.setattr("tersor.methods.method._METHODS", dict(methods()))  # methods that a page adds go with it
    run_page(page, terminal, namespace.__dict__)


def options_table(verb: str) -> str:
    """The options of one verb of the command line as a Markdown table; of `compress`, those that its methods share."""
    command = typer.main.get_command(app).get_command(None, verb)  # type: ignore[attr-defined]
    command = getattr(command, "commands", {}).get("recipe", command)
    rows = ["| option | |", "| --- | --- |"]
    for parameter in command.params:
        if parameter.param_type_name == "argument" or parameter.hidden:
            continue
        names = "`, `".join([*parameter.opts, *parameter.secondary_opts])
        default = parameter.default() if callable(parameter.default) else parameter.default
        told = "" if default is None or default is False or default == "" else f" (default: {default})"
        required = " (required)" if parameter.required else ""
        rows.append(f"| `{names}` | {parameter.help}{told}{required} |")
    return "\n".join(rows)


OPTIONS = re.compile(r"(<!-- options of (\w+) -->\n\n).*?(\n\n<!-- end -->)", re.S)


def with_current_options(text: str) -> str:
    """The page with every table of options made anew."""
    return OPTIONS.sub(lambda found: found[1] + options_table(found[2]) + found[3], text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_of_options_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_current_options(text), (
        "an option changed: run `python tests/test_docs.py` to write the tables anew"
    )


def test_every_verb_has_its_table_of_options_on_a_page() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert set(VERBS) == {found[2] for text in pages for found in OPTIONS.finditer(text)}
    assert sum(text.count("<!-- options of ") for text in pages) == sum(len(OPTIONS.findall(text)) for text in pages)


PICTURE = re.compile(r"!\[[^\]]*\]\(images/([\w.]+)\)")


def pictures_of(page: Path) -> list[str]:
    """But for those that the benchmark of their name draws."""
    shown = PICTURE.findall(page.read_text(encoding="utf-8"))
    return [name for name in shown if not (ROOT / "benchmarks" / f"{Path(name).stem}.py").is_file()]


@pytest.mark.parametrize("page", [p for p in PAGES if pictures_of(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_pictures_are_made_by_the_pages_own_commands(page: Path) -> None:
    code = "\n".join(block.code for block in blocks_of(page))
    for name in pictures_of(page):
        assert (ROOT / "docs" / "images" / name).is_file(), "run `python tests/test_docs.py pictures` to make it"
        assert f"--plot {name}" in code


def make_pictures(page: Path) -> None:
    """Run a page's blocks and keep the pictures that it shows."""
    with tempfile.TemporaryDirectory() as folder, programs_of(Path(folder)) as terminal:
        work = Path(folder) / "page"
        work.mkdir()
        with contextlib.chdir(work):
            run_page(page, terminal, {})
        for name in pictures_of(page):
            shutil.copy(work / name, ROOT / "docs" / "images" / name)


def message_templates() -> list[str]:
    """Every piece of text in the source, with `...` for what is filled in."""

    def flat(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(flat(value) for value in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "..."

    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    return [flat(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant)]


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    quoted = re.findall(r"^#+ `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    templates = message_templates()
    assert len(quoted) > 10
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.S)
        assert any(pattern.search(each) for each in templates), f"no message in the code reads {message!r}"


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in listed, f"{page.name} is missing from nav in mkdocs.yml"


def generated_pages() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generated_pages", ROOT / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_and_model_gets_a_page_with_all_it_says() -> None:
    pages = generated_pages().pages()
    for kind in methods().values():
        page = pages[f"methods/{kind.__module__.rpartition('.')[2]}.md"]
        assert f"`tersor compress {kind.name}`" in page
        assert all(f"| `{field.name}` |" in page for field in dataclasses.fields(kind))
    for info in models.list():
        page = pages[f"models/{info.family}/{info.module.rpartition('.')[2]}.md"]
        assert f"| `{info.name}` | {info.parameters:,} |" in page
        assert "Proven" in page


def test_docstrings_show_on_pages_as_they_read() -> None:
    said = "A <layer> of a*b, [n] and `x_*` of\n* points x_|y\n\n    W * x <- y"
    shown = "A \\<layer\\> of a\\*b, \\[n\\] and `x_*` of\n* points x\\_\\|y\n\n    W * x <- y"
    assert generated_pages().as_markdown(said) == shown


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_current_options(each.read_text(encoding="utf-8")), encoding="utf-8")
        if "pictures" in sys.argv[1:] and pictures_of(each):
            make_pictures(each)
