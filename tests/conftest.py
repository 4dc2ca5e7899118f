"""What all tests share: a small language model on disk, the command line as a function, and few examples for hypothesis."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

from tersor.checkpoint.room import RESULT_FILE, RUN_FILE
from tersor.checkpoint.source import resolve

settings.register_profile(
    "tersor", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tersor")

# Files that take minutes begin first: a process that ends with one of them would leave the others idle.
LONGEST_FIRST = (
    "test_docs.py",
    "test_every_model.py",
    "test_main_job.py",
    "test_golden.py",
    "test_several_processes.py",
    "test_sweep.py",
    "test_larger_than_memory.py",
    "test_advisor.py",
    "test_harness.py",
    "test_llama_gpu.py",
    "test_decode_triton.py",
    "test_nothing_is_lost.py",
    "test_every_method.py",
    "test_interrupted.py",
    "test_trainer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99)


os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray spells it so; of its own 15 its workers would starve here)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
EXTRA_FILES = {  # beside the model, to be carried along
    "LICENSE": "Do as you like.\n",
    "chat_template.jinja": "{{ messages }}\n",
    "processor/nested.json": '{"kept": true}\n',
    "processor/config.json": '{"of": "another kind"}\n',
}


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit status, and what it printed."""

    status: int
    out: str
    err: str


class Stopped(BaseException):
    """What a test raises in the middle of a job."""


@pytest.fixture
def files_left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """So many files, [0], get their names before the next one raises Stopped instead; without end until a test says so."""
    replace, left = os.replace, [10**9]

    def replace_and_count(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_and_count)
    return left


WRITERS = ("generate", "chat", "transcribe", "show")  # verbs that print a text as it is
BETWEEN_COLUMNS = re.compile(r"\S {2,}\S")


def check_plain(arguments: list[str], out: str) -> None:
    """What a command prints into a pipe of 80 columns: JSON for every parser, or plain lines; those of tables are that wide."""
    assert "\x1b" not in out or arguments[:1] == ["generate"]  # a model may write any character
    if "--json" in arguments:
        for line in out.splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    elif arguments[:1] not in [[verb] for verb in WRITERS] and not {"--help", "-h"} & set(arguments):
        for line in out.splitlines():
            assert line == line.rstrip(), f"blanks at the end of {line!r}"
            assert len(line) <= 80 or not BETWEEN_COLUMNS.search(line), f"wider than 80 columns: {line!r}"


@pytest.fixture
def tersor_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The command line, run in this process: as `tersor ARGUMENTS`, after its imports. What it prints is checked."""
    from tersor.cli.main import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        status = 0
        try:
            main([str(each) for each in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        check_plain([str(each) for each in arguments], captured.out)
        return Ran(status, captured.out, captured.err)

    monkeypatch.setenv("COLUMNS", "80")
    return run


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two narrow layers with random weights, the demo's tokenizer, and files and a tensor that nobody knows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("models") / "small"
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(resolve("demo") / name, folder / name)
    for name, content in EXTRA_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.weight": torch.arange(6.0).view(2, 3)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def small(small_source: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may damage."""
    return Path(shutil.copytree(small_source, tmp_path / "small"))


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint of one file in place."""
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file under a directory; of the record of times, which differ from run to run, only the name, and of
    the record of the result all but what the job was asked, which may be said in other words."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> bytes:
    if path.name == RUN_FILE:
        return b""
    if path.name != RESULT_FILE:
        return path.read_bytes()
    said = json.loads(path.read_bytes())
    said.pop("settings", None)
    return json.dumps(said).encode()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of texts that are too large to ship; a test that needs it says so where it is not there."""
    folder = Path(os.environ.get("TERSOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data at {folder}: set TERSOR_DATA")
    return folder
