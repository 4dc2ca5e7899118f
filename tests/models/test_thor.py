"""THOR beyond its golden cases: routing, the consistency loss, generation, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.text.thor import EOS, PADDING, consistency, smoothed_cross_entropy, training_loss

SMALL: dict[str, Any] = {**tersor.models.find("thor").small, "num_experts": 3}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("thor", **SMALL).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    source, target = torch.randint(3, 40, (2, 8)), torch.randint(3, 40, (2, 6))
    source[1, :3], target[0, 4:] = PADDING, PADDING
    previous = torch.cat((torch.full((2, 1), EOS), target[:, :-1]), 1)
    return source, previous, target


@torch.no_grad()
def test_any_routing_of_equal_experts_is_the_dense_model(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    for name, value in model.state_dict().items():
        if ".fc1." in name or ".fc2." in name:
            parts = name.split(".")
            if parts[4].isdigit():
                value.copy_(model.state_dict()[".".join((*parts[:4], "0", *parts[5:]))])
    torch.testing.assert_close(model(*batch[:2]), model(*batch[:2], 0))


@torch.no_grad()
@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_everywhere_is_the_dense_model_of_it(
    model: nn.Module, batch: tuple[Tensor, ...], expert: int
) -> None:
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if len(parts) > 4 and parts[3] in ("fc1", "fc2") and parts[4].isdigit():
            if parts[4] != str(expert):
                continue
            name = ".".join((*parts[:4], "0", *parts[5:]))
        state[name] = value
    dense = tersor.models.load("thor", state, **{**SMALL, "num_experts": 1})
    torch.testing.assert_close(model(*batch[:2], expert), dense(*batch[:2]))


@torch.no_grad()
def test_a_changed_lot_changes_its_token_alone(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    layer = model.encoder.layers[0]
    x, chosen = torch.randn(2, 8, 16), torch.zeros(8, 2, dtype=torch.long)
    changed = chosen.clone()
    changed[5, 1] = 2

    class Told:
        def __init__(self, lot: Tensor) -> None:
            self.lot = lot

        def next(self, _x: Tensor) -> Tensor:
            return self.lot.t()

    difference = (layer._widen(x, Told(chosen)) - layer._widen(x, Told(changed))).abs().amax(-1)
    assert difference.nonzero().tolist() == [[1, 5]]


@torch.no_grad()
def test_lots_are_for_each_token_or_for_each_place(batch: tuple[Tensor, ...]) -> None:
    same_row = batch[0][:1].expand(4, -1)
    for level, equal in ((0, False), (1, True)):
        torch.manual_seed(0)
        model = tersor.models.create("thor", **SMALL, inference_level=level).eval()
        memory, _ = model.encode(same_row)
        assert torch.allclose(memory, memory[:1].expand(4, -1, -1), atol=1e-6) == equal
        assert not torch.allclose(memory, model.encode(same_row)[0])  # drawn again


def test_gradients_reach_only_the_experts_that_were_drawn(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    training_loss(model.train(), *batch, experts=(0, 2))["loss"].backward()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        idle = len(parts) > 4 and parts[3] in ("fc1", "fc2") and parts[4] == "1"
        assert (parameter.grad is None) == idle, name


def test_the_consistency_is_symmetric_and_zero_for_equal_runs(batch: tuple[Tensor, ...]) -> None:
    p, q = torch.randn(2, 2, 6, 40)
    target = batch[2]
    assert consistency(p, p, target) == 0
    torch.testing.assert_close(consistency(p, q, target), consistency(q, p, target))
    q[0, 4:] += 100 * torch.randn(2, 40)  # padding
    torch.testing.assert_close(consistency(p, q, target), consistency(q, p, target))
    loss, nll = smoothed_cross_entropy(p, target)
    changed = p.clone()
    changed[0, 4:] = 7
    assert torch.equal(smoothed_cross_entropy(changed, target)[0], loss)
    torch.testing.assert_close(smoothed_cross_entropy(p, target, smoothing=0.0)[0], nll)


@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    source, previous, _ = batch
    memory = model.encode(source, 1)
    whole, _ = model.prefill(previous, memory, routes=1)
    torch.testing.assert_close(whole, model(source, previous, 1))
    logits, state = model.prefill(previous[:, :3], memory, routes=1)
    torch.testing.assert_close(logits, whole[:, :3], rtol=1e-5, atol=1e-5)
    for t in range(3, 6):
        logits, state = model.step(previous[:, t], state, memory, routes=1)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_of_a_source_changes_nothing(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    source, previous, _ = batch
    together, alone = model(source, previous, 0), model(source[1:, 3:], previous[1:], 0)
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


def test_learning_to_copy_makes_the_experts_agree() -> None:
    torch.manual_seed(0)
    model = tersor.models.create(
        "thor", **{**SMALL, "vocab": 12, "num_experts": 2, "encoder_layers": 1, "decoder_layers": 1}
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(30):
        source = torch.randint(3, 12, (16, 4))
        previous = torch.cat((torch.full((16, 1), EOS), source[:, :-1]), 1)
        losses = training_loss(model, source, previous, source)
        optimizer.zero_grad()
        (losses["loss"] / source.numel()).backward()
        optimizer.step()
        history.append(
            (losses["nll"].item(), training_loss(model, source, previous, source, experts=(0, 1))["consistency"].item())
        )
    assert history[-1][0] < 0.9 * history[0][0]
    assert history[-1][1] < 0.2 * history[0][1]


@pytest.mark.parametrize(
    ("config", "said"),
    [({"inference_level": 2}, "2"), ({"encoder_attention_heads": 3}, "3"), ({"decoder_embed_dim": 32}, "32")],
)
def test_refuses_what_cannot_work(config: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.models.create("thor", **{**SMALL, **config})


def test_refuses_experts_and_routes_that_are_not_there(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    with pytest.raises(TersorError, match="expert 3"):
        model(*batch[:2], 3)
    with pytest.raises(TersorError, match="fewer routes"):
        model(*batch[:2], [torch.zeros(8, dtype=torch.long)])
