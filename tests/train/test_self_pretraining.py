"""Self-pretraining: what its loss feels, which weights it hands on, and that it helps where labels are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.denoising import Denoising, DenoisingConfig
from tersor.errors import TersorError
from tersor.train.config import TrainConfig
from tersor.train.objectives import answering
from tersor.train.self_pretraining import denoising, pretraining_model, self_pretrain, transfer
from tersor.train.trainer import train, validate

LENGTH, WORDS = 8, 8


class Fixed(nn.Module):
    """Predictions that are there from the start."""

    def __init__(self, predictions: Tensor) -> None:
        super().__init__()
        self.predictions = predictions

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions


def halves(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences of which the second half repeats the first (class 1), or not."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 3 + WORDS, (count, LENGTH), generator=chance)
    repeats = torch.randint(2, (count,), generator=chance)
    half = LENGTH // 2
    x[:, half:] = torch.where(repeats[:, None] == 1, x[:, :half], x[:, half:])
    return [{"x": row, "target": target} for row, target in zip(x, repeats, strict=True)]


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create(
        "spt", **{"vocab": 3 + WORDS, "d_output": 2, "d_model": 16, "n_layers": 1, "heads": 2, "max_len": 16, **options}
    )


def test_the_loss_does_not_feel_what_is_not_asked() -> None:
    x = torch.zeros(1, 3, 2)
    numbers, target = torch.tensor([[[0.5], [2.0], [1.0]]]), torch.tensor([[1.0, -10_000, 3.0]])
    loss = denoising(Fixed(numbers), {"x": x, "target": target})["loss"]
    assert loss == (0.5 + 2.0) / 2
    numbers = numbers + torch.tensor([[[0.0], [100.0], [0.0]]])
    assert denoising(Fixed(numbers), {"x": x, "target": target})["loss"] == loss

    logits, classes = torch.randn(1, 3, 5), torch.tensor([[4, -100, -100]])
    expected = -logits.log_softmax(-1)[0, 0, 4]
    changed = logits.clone()
    changed[0, 1:] += torch.randn(2, 5)
    for each in (logits, changed):
        torch.testing.assert_close(denoising(Fixed(each), {"x": x, "target": classes})["loss"], expected)
    nothing = torch.full((1, 3), -100)
    assert denoising(Fixed(logits), {"x": x, "target": nothing})["loss"] == 0


@pytest.mark.parametrize(
    ("system", "options", "fresh"),
    [
        ("spt", {"d_output": 2, "head": "mlp"}, {"encoder.weight", "decoder.0.", "decoder.2."}),
        ("s4", {"d_output": 2}, {"encoder.weight", "decoder."}),
        ("s4", {"d_output": 2, "vocab": 7, "retrieval": True}, {"decoder."}),
    ],
)
def test_all_but_head_and_input_is_handed_on(system: str, options: dict[str, Any], fresh: set[str]) -> None:
    info = tersor.models.find(system)
    model = tersor.models.create(system, **{**info.small, **options})
    sequence = torch.randint(7, (20,)) if "vocab" in options else torch.rand(20, 1)
    twin = pretraining_model(model, [{"x": sequence}], DenoisingConfig())
    told = transfer(twin.state_dict(), model)
    assert all(any(name.startswith(part) for part in fresh) for name in told.fresh)
    assert all(any(name.startswith(part) for name in told.fresh) for part in fresh)
    for name in told.kept:
        assert torch.equal(model.state_dict()[name], twin.state_dict()[name])
    inputs, _ = Denoising([{"x": sequence}], DenoisingConfig())[0].values()
    assert twin(inputs[None]).shape == (1, 20, 7 if "vocab" in options else 1)


def test_grey_values_are_asked_for_as_classes() -> None:
    task = DenoisingConfig(pixel_classes=True)
    data = Denoising([{"x": torch.rand(20, 1) * 2 - 1, "target": torch.tensor(0)}], task)
    twin = pretraining_model(small(vocab=None, max_len=32), data.labelled, task)
    batch = {name: value[None] for name, value in data[0].items()}
    assert twin(batch["x"]).shape == (1, 20, 256)
    assert 4 < denoising(twin, batch)["loss"] < 7  # log 256 = 5.5


def test_a_language_model_is_pretrained_on_the_next_token(tmp_path: Path) -> None:
    labelled = [{"input_ids": torch.arange(1, 11) % 7 + 1, "target": torch.tensor(1)}] * 8
    model = tersor.models.create("cot", **{**tersor.models.find("cot").small, "vocab": 9})
    with pytest.raises(TersorError, match="cot's pretraining is causal, not masked"):
        pretraining_model(model, labelled, DenoisingConfig())
    settings = TrainConfig(epochs=1, batch_size=4, device="cpu")
    told = self_pretrain(model, labelled, out=tmp_path, config=settings, task=DenoisingConfig(objective="causal"))
    assert not told.fresh


@pytest.mark.parametrize(
    ("name", "options", "objective", "said"),
    [
        ("spt", {}, "causal", "set causal=True"),
        ("spt", {"causal": True}, "masked", "set causal=False"),
        ("s4", {"bidirectional": True}, "causal", "masked, not causal"),
        ("s4d", {}, "masked", "s4d has no outputs at every position"),
    ],
)
def test_an_objective_that_does_not_go_with_the_model_is_refused(
    name: str, options: dict[str, Any], objective: str, said: str
) -> None:
    model = tersor.models.create(name, **{**tersor.models.find(name).small, **options})
    with pytest.raises(TersorError, match=said):
        pretraining_model(model, [{"x": torch.rand(9, 1)}], DenoisingConfig(objective=objective))


def test_it_helps_where_labels_are_few(tmp_path: Path) -> None:
    """500 labels, 100 steps: that one half repeats the other is learned from holes, hardly from labels alone."""
    labelled, unseen = halves(500, seed=0), halves(500, seed=1)
    often: dict[str, Any] = {"batch_size": 50, "lr": 5e-3, "device": "cpu", "lr_schedule": "constant"}
    often |= {"validate_every": 10_000, "log_every": 10_000}
    accuracy = {}
    for pretrained in (False, True):
        model = small()
        if pretrained:
            settings = TrainConfig(epochs=40, **often)
            holes = DenoisingConfig(ratio=0.2)
            self_pretrain(model, labelled, out=tmp_path / "pretraining", config=settings, task=holes)
        settings = TrainConfig(epochs=10, **often)
        train(model, labelled, objective=answering, out=tmp_path / str(pretrained), config=settings)
        accuracy[pretrained] = validate(model, unseen, answering, batch_size=100)["accuracy"]
    assert accuracy[True] > 0.95
    assert accuracy[True] > accuracy[False] + 0.1  # measured: 0.98 and 0.81
