"""Vim with token pruning: keeping all is the dense model, the alignment's properties, batches, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.errors import TersorError
from tersor.kernels.selective_scan import selective_scan
from tersor.layers.aligned_scan import aligned_scan, gaps, spans

SMALL = {"img_size": 40, "patch_size": 8, "num_classes": 3, "embed_dim": 16, "depth": 4, "d_state": 4}


@pytest.fixture(scope="module")
def scanned() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 20, 6, generator=random), torch.rand(2, 20, 6, generator=random) + 0.1
    B, C = torch.randn(2, 20, 4, generator=random), torch.randn(2, 20, 4, generator=random)
    A = -torch.rand(6, 4, generator=random) - 0.2
    kept = torch.stack([torch.randperm(20, generator=random)[:9].sort().values for _ in range(2)])
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "kept": kept}


def rows(x: Tensor, kept: Tensor) -> Tensor:
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def aligned(s: dict[str, Tensor], A: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    kept = s["kept"] if kept is None else kept
    x, dt, B, C = (rows(s[name], kept) for name in ("x", "dt", "B", "C"))
    return aligned_scan(x, dt, spans(s["dt"], kept), s["A"] if A is None else A, B, C)


def naive(s: dict[str, Tensor], A: Tensor) -> Tensor:
    x, dt, B, C = (rows(s[name], s["kept"]) for name in ("x", "dt", "B", "C"))
    return selective_scan(x, dt, A, B, C)[0]


def test_the_aligned_scan_is_the_dense_one_with_nothing_fed_at_dropped_places(scanned: dict[str, Tensor]) -> None:
    s, kept = scanned, scanned["kept"]
    fed = torch.zeros_like(s["x"]).scatter(1, kept[..., None].expand(-1, -1, 6), rows(s["x"], kept))
    dense, _ = selective_scan(fed, s["dt"], s["A"], s["B"], s["C"])
    torch.testing.assert_close(aligned(s), rows(dense, kept), rtol=1e-4, atol=1e-5)


def test_states_that_are_held_or_forgotten_need_no_alignment(scanned: dict[str, Tensor]) -> None:
    held, forgotten = torch.zeros(6, 4), torch.full((6, 4), -1e4)
    for A in (held, forgotten):
        torch.testing.assert_close(aligned(scanned, A), naive(scanned, A), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(aligned(scanned), naive(scanned, scanned["A"]), atol=1e-2)


def test_dropping_the_tail_changes_nothing_before_it(scanned: dict[str, Tensor]) -> None:
    s = scanned
    dense, _ = selective_scan(s["x"], s["dt"], s["A"], s["B"], s["C"])
    head = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(aligned(s, kept=head), dense[:, :12], rtol=1e-4, atol=1e-5)


def test_gaps_count_places_in_either_direction() -> None:
    places = torch.tensor([[0, 1, 4, 9]])
    assert gaps(places).tolist() == [[1, 1, 3, 5]]
    assert gaps(places.flip(1)).tolist() == [[1, 5, 3, 1]]


@torch.no_grad()
def test_keeping_all_tokens_is_the_dense_model() -> None:
    torch.manual_seed(0)
    dense = tersor.models.create("vim", **SMALL).eval()  # 25 patches: the class token is not quite in the middle
    all_kept = tersor.models.load("vim", dense.state_dict(), **SMALL, prune_after=(1, 2), keep=1.0)
    image = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(all_kept(image), dense(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruning", ["paper", "snapshot"])
@torch.no_grad()
def test_pictures_of_a_batch_are_pruned_each_for_itself(pruning: str) -> None:
    torch.manual_seed(0)
    config = {**SMALL, "img_size": 32, "prune_after": (1, 2), "keep": 0.5, "pruning": pruning}
    model = tersor.models.create("vim", **config).eval()
    image = torch.randn(3, 3, 32, 32)
    together, kept = model.encode(image)  # type: ignore[operator]
    assert [each.shape[1] for each in kept] == [8, 4]
    assert not torch.equal(kept[0][0], kept[0][1])
    alone = torch.cat([model.encode(each[None])[0] for each in image])  # type: ignore[operator]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "told"), [({"keep": 0.0}, "0..1"), ({"prune_after": (5,)}, "prune_after"), ({"pruning": "x"}, "pruning")]
)
def test_refuses_what_cannot_be_built(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        tersor.models.create("vim", **{**SMALL, **wrong})
    with pytest.raises(TersorError, match="40 x 40"):
        tersor.models.create("vim", **SMALL)(torch.randn(1, 3, 48, 48))
