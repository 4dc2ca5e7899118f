"""Adaptive token sampling: from a ViT to a model that loads, saves, counts and drops as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tersor
import tersor.models
from tersor.methods.tokens.ats import AdaptiveTokenSampling
from tersor.models.vision.ats import masked_softmax, resize_positions, sample_alone, sample_tokens, token_scores

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}


def small_vit(**other: Any) -> Any:
    """A ViT with random weights, large enough that its class token looks at some patches more than at others."""
    torch.manual_seed(0)
    model = tersor.models.create("vit", **{**SMALL, **other}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight") or name in ("pos_embed", "cls_token"):
                parameter.normal_(std=0.3)
    return model


def sampled(model: Any, **options: Any) -> Any:
    """The ViT with token sampling."""
    return tersor.compress(model, AdaptiveTokenSampling(**options), format=None).model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_model_that_drops_nothing_is_the_vit() -> None:
    vit = small_vit()
    config = {**SMALL, "ats_blocks": ()}
    ats: Any = tersor.models.load("ats", vit.state_dict(), **config)
    torch.testing.assert_close(ats(images()), vit(images()), rtol=1e-4, atol=1e-4)
    assert ats.tokens(images()).unique().tolist() == [65]


@torch.no_grad()
@pytest.mark.parametrize("drop", [True, False])
def test_tokens_are_counted_exactly_in_half_precision(drop: bool) -> None:
    ats = tersor.models.create("ats", **{**SMALL, "img_size": 72}, ats_blocks=(), drop_tokens=drop).bfloat16()
    image = torch.zeros(1, 3, 72, 72, dtype=torch.bfloat16)
    assert ats.tokens(image).unique().tolist() == [(72 // SMALL["patch_size"]) ** 2 + 1]  # which bfloat16 does not hold


@torch.no_grad()
def test_images_keep_different_numbers_of_tokens_and_never_more_later() -> None:
    ats = sampled(small_vit(), ats_blocks="1-")
    tokens = ats.tokens(images(8))
    assert (tokens[:, 0] == 65).all()
    assert (tokens[:, 1:] <= tokens[:, :-1]).all()
    assert (tokens[:, -1] < 65).all()
    assert len(tokens[:, -1].unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1.0, 20, 0.5])
def test_one_sampling_block_gives_the_same_masked_dropped_or_alone(num_tokens: float) -> None:
    vit = small_vit()
    dropped = sampled(vit, ats_blocks="1", num_tokens=num_tokens)
    masked = sampled(vit, ats_blocks="1", num_tokens=num_tokens, drop_tokens=False)
    expected = dropped(images())
    assert torch.equal(masked.tokens(images()), dropped.tokens(images()))
    for other in (masked(images()), torch.cat([dropped(image[None]) for image in images()])):
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masked_images_do_not_depend_on_each_other() -> None:
    masked = sampled(small_vit(), ats_blocks="0-", drop_tokens=False)
    alone = torch.cat([masked(image[None]) for image in images()])
    torch.testing.assert_close(masked(images()), alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("num_tokens", "most"), [(30, 30), (0.2, 13), (1.0, 65), (2, 8), (500, 65)])
def test_num_tokens_bounds_what_is_left(num_tokens: float, most: int) -> None:
    result = tersor.compress(
        small_vit(),
        AdaptiveTokenSampling(ats_blocks="0-", num_tokens=num_tokens),
        calibration=[{"image": images(), "target": torch.zeros(4, dtype=torch.long)}],
        format=None,
    )
    rows = [report.row() for report in result.summary.layers]
    assert [row["name"] for row in rows] == [f"blocks.{n}" for n in range(4)]
    assert {row["most tokens"] for row in rows} == {most}
    tokens = result.model.tokens(images())  # type: ignore[operator]
    assert int(tokens[:, 0].max()) <= most
    assert rows[-1]["tokens left"] == pytest.approx(float(tokens[:, -1].double().mean()))


def reference(scores: list[float], points: int) -> list[int]:
    """The sampling of one image in plain Python, in float64: numbers of the kept tokens in order of rising score."""
    order = sorted(range(len(scores)), key=lambda j: scores[j])
    c, total = [], 0.0
    for j in order:
        total += scores[j]
        c.append(total)
    c = [(value - c[0]) / (c[-1] - c[0]) for value in c]
    y0 = min(value for value in c if value > 0)
    picked = []
    for i in range(points):
        y = y0 + i * (1 - y0) / (points - 1)
        picked.append(min(range(len(c)), key=lambda j: abs(y - c[j])))
    picked.sort()
    unique = [a for a, b in zip(picked, [*picked[1:], 1], strict=True) if a != b]
    return [order[position] for position in unique]


@given(st.integers(0, 10_000), st.integers(4, 40), st.integers(7, 40), st.floats(0.1, 6))
def test_sampling_is_that_of_the_definition(seed: int, count: int, points: int, peak: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, count, generator=generator, dtype=torch.float64).mul(peak).softmax(-1)
    found = sample_tokens(scores, points)[0].tolist()
    kept = [token for token in found if token < count]
    assert kept == reference(scores[0].tolist(), points)
    assert found == kept + [count] * (min(points, count) - len(kept))


def test_position_one_is_dropped_where_it_is_the_last() -> None:
    scores = torch.tensor([[0.3, 0.7]])  # c = 0, 1: every point names position 1
    assert sample_tokens(scores, 8)[0].tolist() == [2, 2]


@torch.no_grad()
def test_few_tokens_stay_and_give_numbers() -> None:
    ats = sampled(small_vit(img_size=8), ats_blocks="0-")  # four patches
    for logits in (ats(images()[..., :8, :8]), sampled(small_vit(img_size=4), ats_blocks="0-")(images()[..., :4, :4])):
        assert torch.isfinite(logits).all()


@torch.no_grad()
@pytest.mark.parametrize("blocks", ["1-", "2", "0,3"])
def test_operations_are_those_that_torch_counts(blocks: str) -> None:
    ats = sampled(small_vit(), ats_blocks=blocks)
    for image in images():
        with FlopCounterMode(display=False) as counter:
            ats(image[None])
        assert int(ats.operations(ats.tokens(image[None]))) == counter.get_total_flops()


def test_gradients_flow_through_the_kept_rows() -> None:
    ats = sampled(small_vit(), ats_blocks="1-")
    image = images().requires_grad_()
    ats(image).square().sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 0


@torch.no_grad()
def test_masked_model_can_be_exported() -> None:
    ats = sampled(small_vit(), ats_blocks="1-", drop_tokens=False)
    exported = torch.export.export(ats, (images(),)).module()
    torch.testing.assert_close(exported(images()), ats(images()))


@torch.no_grad()
def test_positions_of_another_image_size_are_resized() -> None:
    ats: Any = tersor.models.load("ats", small_vit().state_dict(), **{**SMALL, "img_size": 48, "ats_blocks": (1,)})
    assert ats.pos_embed.shape == (1, 145, 48)
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(16.0).view(1, 16, 1)], 1)
    up = resize_positions(ramp, 65)
    assert torch.equal(up[:, 0], ramp[:, 0])
    # twice the grid: each old value lies between two new ones, away from the border
    grid, old = up[0, 1:, 0].view(8, 8), ramp[0, 1:, 0].view(4, 4)
    assert torch.allclose(grid.view(4, 2, 4, 2).mean((1, 3))[1:3, 1:3], old[1:3, 1:3])


@torch.no_grad()
def test_demo_vit_from_the_command_line_to_four_bits(tersor_command: Any, tmp_path: Path) -> None:
    ran = tersor_command("compress", "demo-vit", "--method", "ats", "--num-tokens", "0.5", "--out", tmp_path / "ats")
    assert ran.status == 0, ran.err
    saved: Any = tersor.load(tmp_path / "ats")
    made = sampled(tersor.load("demo-vit"), num_tokens=0.5)
    assert saved.config == made.config
    assert torch.equal(saved(images()), made(images()))

    method = tersor.GPTQ(bits=4, group_size=64)
    batches = [{"image": image[None]} for image in images(8)]
    tersor.compress(tmp_path / "ats", method, calibration=batches, out=tmp_path / "small", samples=8)
    quantized: Any = tersor.load(tmp_path / "small")
    logits = quantized(images())
    assert 0 < float((logits - made(images())).norm() / made(images()).norm()) < 0.5
    assert float(quantized.tokens(images())[:, -1].max()) <= 32


def test_excluded_blocks_stay_as_they_are() -> None:
    result = tersor.compress(small_vit(), AdaptiveTokenSampling(ats_blocks="1-"), exclude=["blocks.2.*"], format=None)
    assert result.model.config.ats_blocks == (1, 3)  # type: ignore[union-attr]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(tersor.TersorError, match=r"Sequential is no ViT"):
        sampled(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(tersor.TersorError, match="distilled=True"):
        sampled(small_vit(distilled=True))
    with pytest.raises(tersor.TersorError, match=r"ats_blocks='2-4': the model has blocks 0 to 3, not 2-4"):
        sampled(small_vit(), ats_blocks="2-4")
    with pytest.raises(tersor.TersorError, match="leaves no block"):
        tersor.compress(small_vit(), AdaptiveTokenSampling(), exclude=["*qkv"], format=None)
    for options in ({"ats_blocks": "first"}, {"num_tokens": 0.0}, {"num_tokens": 20.5}):
        with pytest.raises(tersor.TersorError, match="is not allowed"):
            AdaptiveTokenSampling(**options)  # type: ignore[arg-type]
    for options in ({"ats_blocks": (4,)}, {"num_tokens": (8.0,)}, {"num_tokens": (8.0, 9.5, 1.0, 1.0)}):
        with pytest.raises(tersor.TersorError, match=next(iter(options))):
            tersor.models.create("ats", **{**SMALL, "ats_blocks": (1,), **options})


@pytest.mark.parametrize("zeros", [0, 5, 40])
def test_an_image_alone_keeps_what_the_formulas_say(zeros: int) -> None:
    torch.manual_seed(zeros)
    for n, points in ((3, 7), (17, 7), (41, 16), (65, 64), (30, 64)):
        logits, v = 3 * torch.randn(1, 2, 1, n), torch.randn(1, 2, n, 8)
        v[:, :, 1 : 1 + zeros] = 0
        scores = token_scores(masked_softmax(logits, None), v)
        sampled = sample_tokens(scores, points)[0]
        wanted = [0, *(sampled[sampled < n - 1] + 1).tolist()]
        assert sample_alone(logits[0, :, 0], v[0], points).tolist() == wanted
