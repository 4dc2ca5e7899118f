"""A model's own code is never run and nobody is asked; and what nobody foresaw is one line, not a traceback."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, change_json

import tersor.cli.evaluate
from tersor.checkpoint.skeleton import build_skeleton
from tersor.checkpoint.source import open_checkpoint

Command = Callable[..., Ran]


def give_code(model: Path, marker: Path) -> None:
    """A file beside the model that leaves a trace where it is run."""
    (model / "own.py").write_text(
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
        "class OwnConfig(PreTrainedConfig): model_type = 'own'\n"
    )


@pytest.mark.parametrize("answer", ["y\n", "yes\n", ""])
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": [None, "own.Own"]}, [None, "own.Own"]])
def test_a_tokenizer_that_brings_code(
    tersor_command: Command,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    auto_map: object,
) -> None:
    give_code(small, tmp_path / "ran")
    change_json(small / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    for verb in (("eval", small, "--seq-len", 32, "--json"), ("generate", small, "--prompt", "-")):
        ran = tersor_command(*verb)
        assert not (tmp_path / "ran").exists()
        assert (ran.status, ran.out) == (2, "")
        assert re.fullmatch(r"tersor: the tokenizer of \S+ needs the model's own code, .*\n", ran.err), ran.err


def test_an_architecture_that_brings_code(
    tersor_command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_code(small, tmp_path / "ran")
    change_json(
        small / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for verb in (("inspect", small), ("eval", small), ("quantize", small, "--out", tmp_path / "out")):
        ran = tersor_command(*verb)
        assert ran.status == 2
        assert "needs the model's own code, which tersor does not run" in ran.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("named", ["somebody/attention", "flash_attention_2", "paged|somebody/attention"])
def test_a_kernel_that_a_config_names_is_not_fetched(small: Path, named: str) -> None:
    change_json(small / "config.json", _attn_implementation=named, attn_implementation=named)
    checkpoint = open_checkpoint(small)
    module = build_skeleton(checkpoint, torch.float32)
    assert module.config._attn_implementation in ("eager", "sdpa")  # type: ignore[union-attr]


def fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError("nobody\nforesaw this")


def test_what_nobody_foresaw_is_one_line_and_its_details_are_in_a_file(
    tersor_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tersor.cli.evaluate, "perplexity", fail)
    ran = tersor_command("eval", "demo", "--json")
    assert (ran.status, ran.out) == (70, "")
    assert len(ran.err.splitlines()) == 1
    assert "a fault of tersor's" in ran.err
    assert "ZeroDivisionError: nobody foresaw this" in ran.err
    assert "--traceback" in ran.err
    named = re.search(r"the details are in (\S+),", ran.err)
    assert named is not None
    details = Path(named[1])
    assert "Traceback" in details.read_text()
    assert "'eval', 'demo'" in details.read_text()
    details.unlink()


def test_traceback_is_shown_where_it_is_asked_for(tersor_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tersor.cli.evaluate, "perplexity", fail)
    ran = tersor_command("--traceback", "eval", "demo")
    assert ran.status == 70
    assert "Traceback (most recent call last)" in ran.err
    assert ran.err.splitlines()[-1].startswith("tersor: this is a fault of tersor's")
    ran = tersor_command("--traceback", "inspect", "nowhere")
    assert ran.status == 2
    assert "Traceback (most recent call last)" in ran.err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/out"), "/out: No space left on device"),
        (MemoryError(), "the memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "the memory does not suffice"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_tersor(
    tersor_command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tersor.cli.evaluate, "perplexity", refuse)
    ran = tersor_command("eval", "demo")
    assert ran.status == 2
    assert ran.err.startswith(f"tersor: {expected}")


def test_a_name_from_a_file_cannot_steer_the_terminal(tersor_command: Command, small: Path) -> None:
    change_json(small / "config.json", architectures=["\x1b[2Jevil"])
    ran = tersor_command("inspect", small)
    assert ran.status == 2
    assert "\x1b" not in ran.err
