"""Autoformer and Informer on data of their own, and GPHT in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import tersor.models
from tersor.cli.main import main
from tersor.data.series import SeriesConfig, load_series
from tersor.errors import TersorError
from tersor.train.objectives import forecasting

SMALL: dict[str, dict[str, Any]] = {
    "autoformer": {
        "seq_len": 24,
        "label_len": 12,
        "pred_len": 6,
        "moving_avg": 5,
        "enc_in": 2,
        "d_model": 16,
        "d_ff": 16,
    },
    "informer": {
        "seq_len": 24,
        "label_len": 12,
        "out_len": 6,
        "enc_in": 2,
        "d_model": 16,
        "d_ff": 16,
        "embed": "timeF",
    },
    "gpht": {"token_len": 6, "GT_pooling_rate": (2, 1), "depth": 2, "GT_d_model": 16, "GT_d_ff": 16, "seq_len": 24},
}


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    hours = np.datetime64("2020-01-01T00:00:00") + np.arange(400).astype("timedelta64[h]")
    wave = np.sin(np.arange(400) * 2 * np.pi / 24)
    path.write_text("date,a,b\n" + "".join(f"{t},{x},{3 - 2 * x}\n" for t, x in zip(hours, wave, strict=True)))
    return path


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_falls_in_a_few_steps(name: str, daily: Path) -> None:
    torch.manual_seed(0)
    model = tersor.models.create(name, **SMALL[name], **({"pred_len": 6} if name == "gpht" else {}))
    label_len = getattr(model.config, "label_len", 0)
    windows = load_series(daily, SeriesConfig(seq_len=24, pred_len=6, label_len=label_len)).train
    batch = default_collate([windows[n] for n in range(0, 160, 10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = forecasting(model.train(), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["autoformer", "informer"])
def test_trains_from_a_csv_on_the_command_line(name: str, daily: Path, tmp_path: Path) -> None:
    settings = [part for key, value in SMALL[name].items() for part in ("--set", f"model.{key}={value}")]
    quick = ["--max-steps", "2", "--batch-size", "4", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", name, "--data", str(daily), "--out", str(tmp_path / "run"), *settings, *quick])
    assert stopped.value.code == 0


def test_a_table_of_another_width_is_refused_with_the_option_to_set(
    daily: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {name: size for name, size in SMALL["autoformer"].items() if name != "enc_in"}
    settings = [part for key, value in sizes.items() for part in ("--set", f"model.{key}={value}")]
    with pytest.raises(SystemExit):
        main(["train", "autoformer", "--data", str(daily), "--out", str(tmp_path / "run"), *settings])
    assert "holds 2 variates, the model takes 7; --set model.enc_in=2" in capsys.readouterr().err.replace("\n", " ")


@torch.no_grad()
def test_autoformers_lags_are_of_the_sample_in_evaluation_and_of_the_batch_in_training() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("autoformer", **SMALL["autoformer"], dropout=0.0)
    inputs = model.example_inputs(3)
    alone = {key: value[:1] for key, value in inputs.items()}
    torch.testing.assert_close(model.eval()(**inputs)[:1], model(**alone))
    assert not torch.allclose(model.train()(**inputs)[:1], model(**alone))


@torch.no_grad()
def test_informer_draws_its_keys_unless_they_are_given() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("informer", **SMALL["informer"], factor=1, e_layers=1, d_layers=1).eval()
    inputs = model.example_inputs(2)
    assert not torch.equal(model(**inputs), model(**inputs))
    keys = [torch.randint(24, (24, 4)), torch.randint(18, (18, 3))]
    assert torch.equal(model(**inputs, index_sample=keys), model(**inputs, index_sample=keys))


@torch.no_grad()
def test_informer_that_keeps_every_query_is_attention_and_makes_its_decoder_input() -> None:
    options = {**SMALL["informer"], "factor": 50, "e_layers": [2, 1], "dropout": 0.0}
    torch.manual_seed(0)
    sparse = tersor.models.create("informer", **options).eval()
    full = tersor.models.create("informer", **options, attn="full").eval()
    full.load_state_dict(sparse.state_dict())
    inputs = sparse.example_inputs(2)
    torch.testing.assert_close(sparse(**inputs), full(**inputs))
    made = {key: value for key, value in inputs.items() if key != "x_dec"}
    torch.testing.assert_close(full(**made), full(**inputs))


@torch.no_grad()
def test_gpht_is_causal_but_for_the_statistics_and_any_horizon_begins_alike() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("gpht", **SMALL["gpht"], dropout=0.0).eval()
    x = torch.randn(2, 24, 3)
    swapped = torch.cat((x[:, :18], x[:, 18:].flip(1)), 1)  # the last token's steps in another order: equal statistics
    torch.testing.assert_close(model.next_tokens(swapped)[:, :18], model.next_tokens(x)[:, :18])
    torch.testing.assert_close(model.next_tokens(7 * x + 3), 7 * model.next_tokens(x) + 3, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.forecast(x, 20)[:, :9], model.forecast(x, 9))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.next_tokens(x[:, :, order]), model.next_tokens(x)[:, :, order])
    with pytest.raises(TersorError, match="multiple of token_len 6 steps, not 20"):
        model.forecast(x[:, :20], 6)


@torch.no_grad()
def test_gpht_says_the_window_mean_with_no_heads_and_learns_from_every_step() -> None:
    model = tersor.models.create("gpht", **SMALL["gpht"], dropout=0.0, pred_len=9, heads_only=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"encoders.{n}.forecast_head.{each}" for n in range(2) for each in ("weight", "bias")]
    for name in trained:
        model.get_parameter(name).zero_()
    x, target = torch.randn(2, 24, 1), torch.randn(2, 9, 1)
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(model.eval()(x)[:, :6], mean.expand(2, 6, 1))  # later ones: of windows that have slid on
    said = model.train()(x)
    assert said.shape == (2, 24 - 6 + 9, 1)
    followed = torch.cat((x, target), 1)[:, 6:]
    loss = forecasting(model, {"x_enc": x, "target": target})["loss"]
    torch.testing.assert_close(loss, F.mse_loss(said, followed))
