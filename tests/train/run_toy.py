"""A small training run; as a process of its own: run_toy.py OUT [SETTING=VALUE ...]; kill_at=N kills it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import tersor.models
from tersor.data.series import Windows
from tersor.train.config import TrainConfig
from tersor.train.objectives import forecasting
from tersor.train.trainer import Trained, train

MODEL = {"seq_len": 24, "pred_len": 12, "d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 1}


def waves(rows: int = 300, seed: int = 0) -> Windows:
    """Three noisy sines of different periods."""
    time = torch.arange(rows)[:, None]
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    values = (2 * torch.pi * time / torch.tensor([6, 8, 12]) + seed).sin() + 0.1 * noise
    return Windows(values, None, seq_len=24, pred_len=12)


def toy(out: Path, *, dropout: float = 0.1, kill_at: int = 0, **settings: object) -> Trained:
    torch.manual_seed(0)
    model = tersor.models.create("itransformer", **MODEL, dropout=dropout)
    config = TrainConfig(**{"device": "cpu", "log_every": 1, "batch_size": 16, "lr": 3e-3, **settings})  # type: ignore[arg-type]

    def kill(_what: str, done: int, _total: int) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(model, waves(), objective=forecasting, out=out, config=config, validation=waves(80, 1), progress=kill)


if __name__ == "__main__":
    toy(Path(sys.argv[1]), **{name: json.loads(text) for name, text in (each.split("=") for each in sys.argv[2:])})
