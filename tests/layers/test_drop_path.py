from __future__ import annotations

import torch

from tersor.layers.drop_path import DropPath, linear_rates


def test_drops_whole_samples_in_training_and_nothing_in_eval() -> None:
    torch.manual_seed(0)
    x, layer = torch.ones(1000, 3, 2), DropPath(0.25)
    dropped = layer.train()(x).flatten(1)
    assert ((dropped == 0).all(1) | (dropped == 1 / 0.75).all(1)).all()
    assert abs(float((dropped == 0).all(1).float().mean()) - 0.25) < 0.05
    assert torch.equal(layer.eval()(x), x)


def test_rates_grow_linearly_over_all_stages() -> None:
    assert linear_rates(0.4, (1, 3, 1)) == [[0.0], [0.1, 0.2, 0.30000000000000004], [0.4]]
    assert linear_rates(0.4, (1,)) == [[0.0]]
