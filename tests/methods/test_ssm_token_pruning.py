"""Token pruning of state-space vision models: the method says how many tokens are left, and the model keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tersor
import tersor.models
from tersor.cli.main import main
from tersor.errors import TersorError
from tersor.methods.tokens.ssm_token_pruning import SsmTokenPruning

VIM = {"img_size": 32, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 4, "d_state": 4}
PLAIN = {"img_size": 64, "patch_size": 8, "num_classes": 3, "embed_dims": 16, "num_layers": 4, "d_state": 4}


def model_of(system: str, **other: Any) -> Any:
    torch.manual_seed(0)
    return tersor.models.create(system, **{**(VIM if system == "vim" else PLAIN), **other}).eval()


def pixels(model: Any, count: int = 2) -> Tensor:
    side = model.config.img_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens_seen(model: Any, image: Tensor) -> list[int]:
    """How many tokens each layer gets, as its norm sees them."""
    layers = model.layers if hasattr(model, "layers") else model.backbone.layers
    seen: list[int] = []
    hooks = [each.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1])) for each in layers]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("pruning", ["paper", "snapshot"])
@pytest.mark.parametrize("system", ["vim", "plainmamba"])
def test_reports_the_tokens_that_each_layer_sees(system: str, pruning: str) -> None:
    if (system, pruning) == ("plainmamba", "snapshot"):
        return
    model = model_of(system)
    result = tersor.compress(model, SsmTokenPruning(prune_after="1,3", keep=0.7, pruning=pruning), format=None)
    seen = tokens_seen(result.model, pixels(model))
    rows = [report.row() for report in result.summary.layers]
    assert [row["tokens"] for row in rows[:3]] == [seen[0], seen[1], seen[3]]
    assert seen[1] == seen[2]
    assert seen[0] > seen[1] > seen[3]
    assert rows[-1]["share"] == pytest.approx(sum(seen) / (4 * seen[0]), abs=1e-3)


@pytest.mark.parametrize("system", ["vim", "plainmamba"])
def test_keeping_all_tokens_changes_nothing_and_the_quarters_are_the_default(system: str) -> None:
    model = model_of(system)
    result = tersor.compress(model, SsmTokenPruning(keep=1.0), format=None)
    changed: Any = result.model
    config = changed.config
    assert config.prune_after == (1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(changed(pixels(model)), model(pixels(model)), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_is_one_line() -> None:
    def refused(model: nn.Module, match: str, **options: Any) -> None:
        with pytest.raises(TersorError, match=match):
            tersor.compress(model, SsmTokenPruning(**options), format=None)

    vit = tersor.models.create("vit", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=2)
    refused(vit, "takes vim and plainmamba")
    refused(model_of("vim"), "after 4 none is left", prune_after="4")
    refused(model_of("vim"), "after 9 there is none", prune_after="1,9")
    refused(model_of("vim", depth=1), "the model has 1 layer")
    refused(model_of("vim", prune_after=(1,)), "drops tokens already, after layers 1")
    refused(model_of("plainmamba"), "is for vim", pruning="snapshot")
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"prune_after": "1,,2"}, {"prune_after": "a"}, {"pruning": "none"}):
        with pytest.raises(TersorError, match=next(iter(wrong))):
            SsmTokenPruning(**wrong)  # type: ignore[arg-type]


def test_the_pruned_folder_is_trained_on_and_keeps_its_preprocessing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(each) for each in arguments])
        told = capsys.readouterr()
        assert stopped.value.code == status, told.err
        return told.err if status else told.out

    random, pictures = np.random.default_rng(0), tmp_path / "pictures"
    for name in ("a", "b", "c"):
        (pictures / name).mkdir(parents=True)
        for n in range(4):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pictures / name / f"{n}.png")
    quick = ("--max-steps", 2, "--batch-size", 4, "--device", "cpu")
    small = [f"--set=model.{name}={value}" for name, value in VIM.items()]
    own = "--set=data.mean=[0.1,0.2,0.3]"
    run("train", "vim", "--data", pictures, "--out", tmp_path / "dense", *small, own, *quick)
    run("compress", "ssm-token-pruning", tmp_path / "dense", "--keep", "0.5", "--out", tmp_path / "pruned")
    told = run("train", tmp_path / "pruned", "--data", pictures, "--out", tmp_path / "tuned", *quick, "--json")
    assert json.loads(told)["steps"] == 2
    tuned: Any = tersor.load(tmp_path / "tuned")
    assert tuned.config.prune_after == (1, 2, 3)
    before = tersor.load(tmp_path / "pruned").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    said = json.loads((tmp_path / "tuned" / "preprocessor_config.json").read_text())
    assert said["image_mean"] == [0.1, 0.2, 0.3]

    again = ("--data", pictures, "--out", tmp_path / "other")
    assert "model.depth goes with the name" in run(
        "train", tmp_path / "pruned", *again, "--set", "model.depth=2", status=2
    )
    assert "leave --checkpoint out" in run(
        "train", tmp_path / "pruned", *again, "--checkpoint", tmp_path / "dense", status=2
    )
    run(
        "quantize", tmp_path / "tuned", "--method", "rtn", "--group-size", -1, "--bits", 8, "--out", tmp_path / "packed"
    )
    run("compress", "greenformers", tmp_path / "tuned", "--rank", 0.5, "--out", tmp_path / "low")
    assert "train first, then compress" in run("train", tmp_path / "low", *again, status=2)
    assert "train first, then quantize" in run("train", tmp_path / "packed", *again, status=2)
