"""Official checkpoints of our architectures, in their published keys, are opened by every verb and by `tersor.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from golden.harness import Case
from safetensors.torch import load_file, save_file
from test_golden import FOLDER, _runner
from torch import Tensor, nn

import tersor
from tersor import RTN, TersorError

CASES = [
    "shvit/tiny_iss",
    "shvit/tiny_sss_distill",
    "efficientformer/v1_tiny_vit1",
    "autoformer/tiny-eval",
    "gtrxl/trl_tiny",
    "sret/tiny_sliced_perm",
    "vssd/micro-224",
]


class Called(Exception):  # noqa: N818
    """What a case's runner gives to `tersor.models.load`."""

    def __init__(self, system: str, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.system, self.state, self.config = system, state, config


def published(name: str, monkeypatch: pytest.MonkeyPatch) -> Called:
    def load(system: str, state: dict[str, Tensor], /, **config: Any) -> nn.Module:
        raise Called(system, state, config)

    path = FOLDER / f"{name}.json"
    runner = _runner(path.parent)
    assert runner is not None
    with monkeypatch.context() as patch:
        patch.setattr("tersor.models.load", load)
        with pytest.raises(Called) as found:
            runner.run(Case(path))
    return found.value


def directory_of(case: Called, folder: Path) -> Path:
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in case.state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tersor_model": case.system, **case.config}))
    return folder


def same(found: nn.Module, expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=0, check_dtype=False)


@pytest.mark.parametrize("name", CASES)
def test_a_directory_in_the_published_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = published(name, monkeypatch)
    folder = directory_of(case, tmp_path / "official")
    expected = tersor.models.load(case.system, case.state, **case.config)
    same(tersor.load(folder, dtype="float32"), expected)

    done = tersor.compress(folder, RTN(bits=8, group_size=-1), out=tmp_path / "packed")
    inputs = expected.example_inputs(1)
    in_memory = tersor.compress(expected, RTN(bits=8, group_size=-1))
    with torch.no_grad():
        found, wanted = tersor.load(done.directory)(**inputs), in_memory.model(**inputs)
    found, wanted = (each[0] if isinstance(each, tuple) else each for each in (found, wanted))
    torch.testing.assert_close(found, wanted)


def test_a_bare_file_is_named_with_as(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tersor.models.create("shvit_s1").eval()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "shvit_s1.pth")
    same(tersor.load(tmp_path / "shvit_s1.pth", variant="shvit_s1"), model)

    ran = tersor_command("inspect", tmp_path / "shvit_s1.pth", "--as", "shvit_s1", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["parameters"] == sum(each.numel() for each in model.parameters())

    command = ("compress", "rtn", tmp_path / "shvit_s1.pth", "--as", "shvit_s1", "--bits", 8, "--group-size", -1)
    ran = tersor_command(*command, "--out", tmp_path / "packed")
    assert ran.status == 0, ran.err
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["tersor_model"] == "shvit"


def test_what_does_not_fit_is_one_line(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    ran = tersor_command("inspect", tmp_path / "other.safetensors")
    assert ran.status == 2
    assert "say with --as which model of `tersor models` a published file is" in ran.err
    ran = tersor_command("inspect", tmp_path / "other.safetensors", "--as", "shvit_s1")
    assert ran.status == 2
    assert "other.safetensors does not fit shvit_s1" in ran.err
    ran = tersor_command("inspect", tmp_path / "other.safetensors", "--as", "shvit_s9")
    assert "no model is named 'shvit_s9'" in ran.err
    ran = tersor_command("inspect", tmp_path / "none.safetensors", "--as", "shvit_s1")
    assert "there is no file" in ran.err


def test_the_official_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = directory_of(published("shvit/tiny_iss", monkeypatch), tmp_path / "official")
    before = load_file(folder / "model.safetensors").keys()
    with pytest.raises(TersorError, match="is the model itself"):
        tersor.compress(folder, RTN(bits=8, group_size=-1), out=folder, overwrite=True)
    assert load_file(folder / "model.safetensors").keys() == before


def test_another_librarys_architecture_is_none_of_ours(tmp_path: Path) -> None:
    from zoo.tiny_models import build

    from tersor.checkpoint.source import open_checkpoint

    build("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architecture": "resnet18"}))
    assert open_checkpoint(tmp_path / "model").origin is None
    assert type(tersor.load(tmp_path / "model")).__name__ == "LlamaForCausalLM"


def test_pickled_weights_reach_methods_on_whole_models(tmp_path: Path) -> None:
    model = tersor.models.create("vit", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    (tmp_path / "model").mkdir()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text(json.dumps(tersor.models.config_of(model)))
    done = tersor.compress(
        tmp_path / "model",
        tersor.compress.from_options("ats", {"ats_blocks": "1-"}),
        out=tmp_path / "out",
        allow_pickle=True,
    )
    assert (done.directory / "model.safetensors").exists()
