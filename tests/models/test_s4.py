from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.layers.diagonal_state_space import parameter_groups
from tersor.models.sequence.s4 import LowRankKernel, S4Block, S4BlockConfig
from tersor.models.sequence.s4d import S4D

CONFIGS: dict[str, dict[str, Any]] = {
    "s4": {"l_max": 48},
    "s4, longest length unknown": {"l_max": None},
    "s4, odd length": {"l_max": 51},
    "s4, rank 2": {"init": "legt", "rank": 2, "l_max": 48},
    "s4, fourier": {"init": "fourier", "l_max": 48},
    "s4, legs and fourier": {"init": "hippo", "n_ssm": 2, "l_max": 48},
    "s4, a step for each state": {"dt_tie": False, "l_max": 48},
    "s4, several channels": {"channels": 3, "l_max": 48},
    "s4, glu in the layer": {"activation": "glu", "l_max": 48},
    "s4, no output linear": {"final_act": None, "l_max": 48},
    "s4d-lin": {"mode": "diag", "init": "diag-lin"},
    "s4d-inv, bilinear": {"mode": "diag", "init": "diag-inv", "disc": "bilinear"},
    "s4d-legs": {"mode": "diag", "init": "diag-legs", "n_ssm": 3, "real_transform": "softplus"},
    "s4d mixture": {"mode": "diag", "init": "diag", "n_ssm": 2, "bandlimit": 0.5},
    "s4d real": {"mode": "diag", "init": "diag-real", "is_real": True, "real_transform": "none", "B_init": "random"},
}


def make(transposed: bool = True, **config: Any) -> S4Block:
    torch.manual_seed(0)
    return S4Block(S4BlockConfig(**{"d_model": 6, "d_state": 8, "transposed": transposed, **config})).eval()


def largest_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recurrence_chunks_and_convolution_agree(config: dict[str, Any]) -> None:
    block = make(transposed=False, **config)
    x = torch.randn(2, 48, 6)
    y = block(x)
    recurrence = block.recurrence()
    state, steps = recurrence.initial_state(2), []
    for u in x.unbind(1):
        step, state = block.step(u, state, recurrence)
        steps.append(step)
    assert largest_error(torch.stack(steps, 1), y) < 5e-5

    chunk_state, chunks = recurrence.initial_state(2), []
    for part in x.split((17, 1, 30), 1):
        chunk, chunk_state = block.chunk(part, chunk_state, recurrence)
        chunks.append(chunk)
    assert largest_error(torch.cat(chunks, 1), y) < 5e-5
    assert largest_error(torch.view_as_real(chunk_state), torch.view_as_real(state)) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_in_float64_all_is_float64(config: dict[str, Any]) -> None:
    block = make(transposed=False, **config).double()
    x = torch.randn(2, 48, 6, dtype=torch.float64)
    y, recurrence = block(x), block.recurrence()
    state, steps = recurrence.initial_state(2), []
    assert state.dtype == torch.complex128
    for u in x.unbind(1):
        step, state = block.step(u, state, recurrence)
        steps.append(step)
    assert steps[0].dtype == y.dtype == torch.float64
    assert largest_error(torch.stack(steps, 1), y) < 1e-10
    chunk, _ = block.chunk(x, recurrence.initial_state(2), recurrence)
    assert largest_error(chunk, y) < 1e-10


@torch.no_grad()
def test_the_minimal_s4d_runs_in_float64() -> None:
    torch.manual_seed(0)
    layer, u = S4D(5, 8).eval().double(), torch.randn(2, 5, 40, dtype=torch.float64)
    recurrence = layer.recurrence()
    state, steps = recurrence.initial_state(2), []
    for position in u.unbind(-1):
        y, state = layer.step(position, state, recurrence)
        steps.append(y)
    assert largest_error(torch.stack(steps, -1), layer(u)) < 1e-10


@torch.no_grad()
def test_the_minimal_s4d_runs_as_a_recurrence() -> None:
    torch.manual_seed(0)
    layer, u = S4D(5, 8).eval(), torch.randn(2, 5, 40)
    recurrence = layer.recurrence()
    state, steps = recurrence.initial_state(2), []
    for position in u.unbind(-1):
        y, state = layer.step(position, state, recurrence)
        steps.append(y)
    assert largest_error(torch.stack(steps, -1), layer(u)) < 1e-5
    torch.testing.assert_close(recurrence.advance(u, recurrence.initial_state(2)), state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_longer_kernel_goes_on_where_the_shorter_one_ends() -> None:
    block = make(l_max=16)
    kernel = block.layer.kernel
    short, _ = kernel(16)
    long, _ = kernel(40)  # doubled twice
    assert kernel.length == int(kernel.l_kernel) == 64
    assert largest_error(long[..., :16], short) < 1e-5
    recurrence = block.recurrence()
    u, state, taps = torch.zeros(1, 6), recurrence.initial_state(1), []
    for position in range(40):
        y, state = recurrence.step(u + (position == 0), state)
        taps.append(y[0])
    assert largest_error(torch.stack(taps, -1), long) < 1e-4


@torch.no_grad()
def test_a_checkpoint_is_loaded_with_or_without_its_kernel_length() -> None:
    model = tersor.models.create("s4", d_model=8, n_layers=2, d_state=8, l_max=32).eval()
    inputs = model.example_inputs(2)
    converted = tersor.models.load("s4", model.state_dict(), **_config(l_max=32))
    torch.testing.assert_close(converted(**inputs), model(**inputs))
    longer = tersor.models.load("s4", model.state_dict(), **_config(l_max=64))
    torch.testing.assert_close(longer(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(model.state_dict())
    for name, kernel in model.named_modules():
        if isinstance(kernel, LowRankKernel):  # published files before the first forward hold the true C
            state[f"{name}.C"] = torch.view_as_real(kernel.recurrence().C.resolve_conj())
            del state[f"{name}.l_kernel"]
    fresh = tersor.models.load("s4", state, **_config(l_max=32))
    torch.testing.assert_close(fresh(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


def _config(**more: Any) -> dict[str, Any]:
    return {"d_model": 8, "n_layers": 2, "d_state": 8, **more}


@torch.no_grad()
@pytest.mark.parametrize("config", [{"l_max": 64}, {"mode": "diag", "init": "diag-lin"}], ids=["s4", "s4d"])
def test_twice_the_rate_samples_the_same_kernel_half_as_often(config: dict[str, Any]) -> None:
    kernel = make(d_state=8, dt_min=0.005, dt_max=0.01, **config).layer.kernel
    fine, coarse = kernel(64)[0], kernel(32, rate=2.0)[0]
    assert largest_error(coarse[..., :16] / 2, fine[..., :32].unfold(-1, 2, 2).mean(-1)) < 0.05


@torch.no_grad()
def test_discretisations_agree_for_small_steps() -> None:
    config = {"mode": "diag", "init": "diag-lin", "dt_min": 1e-4, "dt_max": 1e-3}
    zoh, bilinear = (make(disc=disc, **config).layer.kernel(200)[0] for disc in ("zoh", "bilinear"))
    assert largest_error(bilinear, zoh) < 1e-3


@torch.no_grad()
def test_a_causal_layer_sees_no_future_and_a_masked_one_no_padding() -> None:
    block = make(l_max=32)
    x = torch.randn(2, 6, 32)
    changed = x.clone()
    changed[..., 20:] = 9.0
    torch.testing.assert_close(block(x)[..., :20], block(changed)[..., :20], rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([20, 20])
    torch.testing.assert_close(block(x, lengths=lengths), block(changed, lengths=lengths))


@torch.no_grad()
def test_each_sequence_is_pooled_over_its_own_length() -> None:
    model = tersor.models.create("s4", **_config(vocab=11)).eval()
    x = torch.randint(11, (2, 24))
    features = model.model(model.encoder(x), 1.0)
    logits = model(x, lengths=torch.tensor([24, 7]))
    torch.testing.assert_close(logits[1], model.decoder.output_transform(features[1, :7].mean(0)))


@torch.no_grad()
def test_positions_of_the_output_are_running_means() -> None:
    model = tersor.models.create("s4", **_config(l_output=3)).eval()
    x = torch.randn(2, 24, 1)
    features = model.model(model.encoder(x), 1.0)
    expected = torch.stack([model.decoder.output_transform(features[:, :n].mean(1)) for n in (22, 23, 24)], 1)
    torch.testing.assert_close(model(x), expected)


def test_a_pair_of_sequences_gives_one_result() -> None:
    model = tersor.models.create("s4", **_config(vocab=11, retrieval=True, d_output=2)).eval()
    assert model(**model.example_inputs(3)).shape == (3, 2)


def test_the_dynamics_learn_slowly_and_do_not_decay() -> None:
    model = tersor.models.create("s4", **_config())
    others, dynamics = model.parameter_groups(lr=0.01, weight_decay=0.05)
    assert (dynamics["lr"], dynamics["weight_decay"]) == (0.001, 0.0)
    assert len(dynamics["params"]) == 2 * 5  # inv_dt, A_real, A_imag, B, P of two layers
    assert len(others["params"]) + len(dynamics["params"]) == len(list(model.parameters()))
    assert len(parameter_groups(S4D(4), lr=0.01, weight_decay=0.1)[1]["params"]) == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"mode": "conv"}, "'conv'"),
        ({"d_state": 7}, "7"),
        ({"n_ssm": 5}, "5"),
        ({"init": "lags"}, "'lags'"),
        ({"init": "legt"}, "rank 2"),
        ({"init": "hippo", "n_ssm": 3}, "3"),
        ({"mode": "diag", "init": "diag-log"}, "'log'"),
        ({"activation": "softmax"}, "'softmax'"),
        ({"is_real": True}, "'nplr'"),
    ],
)
def test_refuses_what_cannot_work(config: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        make(**config)


def test_refuses_to_step_where_there_is_no_recurrence() -> None:
    with pytest.raises(TersorError, match="bidirectional"):
        make(bidirectional=True).recurrence()
    with pytest.raises(TersorError, match="dss"):
        make(mode="diag", init="diag-lin", disc="dss").recurrence()


def test_states_beyond_the_band_limit_are_left_out() -> None:
    kernel = make(mode="diag", init="diag-lin", dt_min=0.1, dt_max=0.1, bandlimit=0.12, d_state=16).layer.kernel
    frequency = 0.1 * math.pi * torch.arange(8) / (2 * math.pi)
    assert torch.equal(kernel.c()[0, 0] != 0, frequency < 0.06)
