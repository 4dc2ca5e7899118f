from __future__ import annotations

import typer
from typer.testing import CliRunner

from tersor.cli.models import models
from tersor.errors import TersorError


def run(*arguments: str):  # type: ignore[no-untyped-def]
    app = typer.Typer()
    app.command()(models)
    return CliRunner().invoke(app, arguments)


def test_lists_what_matches() -> None:
    result = run("shvit*")
    assert result.exit_code == 0
    assert ["shvit_s1", "vision", "6,330,808", "image", "arXiv", "2401.16456"] in [
        line.split() for line in result.output.splitlines()
    ]
    assert "efficientformer" not in result.output


def test_says_when_nothing_matches() -> None:
    assert isinstance(run("nothing*").exception, TersorError)
