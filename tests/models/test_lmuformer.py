"""LMUFormer beyond its golden cases: streams, other lengths, neurons, checkpoints with buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.models.sequence.lmuformer import LIF, impulse_response, legendre_memory

SMALL = {"in_channels": 6, "num_classes": 4, "embed_dims": 8, "depths": 2, "theta": 16}


@pytest.fixture(params=["lmuformer", "spiking_lmuformer"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create(request.param, **SMALL).double()  # in float64 no spike hangs on rounding
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.bias.data.normal_(0.7, 0.3)
            module.weight.data.normal_(2, 0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 20, (3, 0, 9, 8), (20,)], ids=["single", "pieces", "one"])
def test_a_stream_equals_the_whole(model: nn.Module, sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    whole = model.all_seq(x)
    state, given = None, []
    for piece in x.split(sizes, 1):
        logits, state = model.stream(piece, state)
        given.append(logits)
    assert sum(logits.shape[1] for logits in given) == 15  # five frames are looked ahead
    given.append(model.stream(x[:, :0], state, last=True)[0])
    torch.testing.assert_close(torch.cat(given, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_last_running_mean_is_the_result_at_any_length(model: nn.Module) -> None:
    for length in (1, 16, 40):  # 40 is longer than theta
        x = torch.randn(2, length, 6, dtype=torch.float64)
        torch.testing.assert_close(model.all_seq(x)[:, -1], model(x))


@torch.no_grad()
def test_spikes_are_zeros_and_ones_and_some_of_each() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("spiking_lmuformer", **SMALL)
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda _module, _inputs, result: seen.append(result[0]))
    model(torch.randn(2, 16, 6))
    spikes = torch.cat([each.flatten() for each in seen])
    assert set(spikes.tolist()) == {0.0, 1.0}


def test_a_neuron_leaks_fires_and_starts_again() -> None:
    x = torch.tensor([1.0, 1.4, 0.0, 2.0, 1.8]).reshape(1, 5, 1).requires_grad_()
    spikes, v = LIF()(x)  # potentials 0.5, 0.95, 0.475, 1.2375 (fires), 0.9
    assert spikes.flatten().tolist() == [0, 0, 0, 1, 0]
    torch.testing.assert_close(v, torch.tensor([[0.9]]))
    spikes[0, 3].sum().backward()
    s = torch.tensor(4 * 0.2375).sigmoid()
    expected = 4 * s * (1 - s) * 0.5
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([expected / 8, expected / 4, expected / 2, expected, 0.0]))


def test_the_memory_holds_legendre_coefficients_of_its_window() -> None:
    """Of u(t) = t over the last theta steps, in reversed time: coefficients 0 and 1 make the line, all others are 0."""
    theta, q = 256, 6
    H = impulse_response(*legendre_memory(q, theta), 2000)
    time = torch.arange(2000, dtype=torch.float64)
    memory = (H * (2000 - time)).sum(1) / theta
    centre = 2000 / theta - 0.5
    torch.testing.assert_close(memory[:2], torch.tensor([centre, -0.5], dtype=torch.float64), rtol=0.02, atol=0)
    assert memory[2:].abs().max() < 0.02


def test_loads_a_checkpoint_with_its_buffers() -> None:
    model = tersor.models.create("lmuformer", **SMALL)
    state = {
        name: value[..., None] if "proj_conv.weight" in name else value for name, value in model.state_dict().items()
    }
    state["block.0.attn.lmu.fft_H"] = torch.zeros(8, 32, dtype=torch.complex64)
    state["block.0.attn.lmu.A"] = torch.zeros(8, 8)
    again = tersor.models.load("lmuformer", state, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
