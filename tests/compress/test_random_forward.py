"""Models that draw random numbers in eval mode too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tersor
from tersor.compress import GPTQ, RTN

MAE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def images(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)} for _ in range(count)]


def test_a_model_that_masks_at_random_is_read_back_with_the_same_mask(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    torch.manual_seed(0)
    ViTMAEModel(ViTMAEConfig(**MAE)).save_pretrained(tmp_path / "mae")
    results = []
    for name in ("one", "other"):
        torch.rand(5)  # whatever the process has drawn before
        tersor.compress(tmp_path / "mae", GPTQ(group_size=32), calibration=images(3), out=tmp_path / name)
        results.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]


class Noisy(nn.Module):
    """Blocks that draw noise each time they are called, of which the statistics of all layers are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x + torch.randn_like(x)).relu()
        return x


def test_a_copy_without_loss_diverges_by_nothing() -> None:
    """Before and after are compared on the same draws: 8 bits leave almost nothing, other noise would leave much."""
    torch.manual_seed(0)
    result = tersor.compress(Noisy(), RTN(bits=8, group_size=32), calibration=[torch.randn(4, 32)], format=None)
    assert result.summary.divergence is not None
    assert result.summary.divergence < 1e-4
