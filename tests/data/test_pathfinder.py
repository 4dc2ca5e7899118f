"""Pathfinder pictures: the answer lies in the contour alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

import tersor.data.pathfinder as pathfinder
from tersor.data.pathfinder import PathfinderConfig, draw_pathfinder, pathfinder_config, render
from tersor.errors import TersorError

EASY = dataclasses.replace(PathfinderConfig(), contour_length=6, distractors=2)  # drawn in a tenth of the time


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, bool]]:
    return [draw_pathfinder(EASY, seed=seed) for seed in range(60)]


def dots(picture: np.ndarray) -> list[tuple[float, float]]:
    """The centres of what is brighter than dashes can be."""
    bright = picture > 255 * 0.95
    found: list[list[tuple[int, int]]] = []
    for row, column in np.argwhere(bright).tolist():
        near = next((dot for dot in found if math.dist(dot[0], (row, column)) < 5), None)
        if near is None:
            found.append(near := [])
        near.append((row, column))
    return [tuple(np.mean(dot, 0)) for dot in found]


def test_a_picture_has_two_dots_at_least_so_far_apart(drawn: list[tuple[np.ndarray, bool]]) -> None:
    for picture, _ in drawn:
        assert picture.shape == (32, 32)
        assert picture.dtype == np.uint8
        first, second = dots(picture)
        assert math.dist(first, second) > EASY.seed_distance - 1.5  # centres are found to a pixel


def test_answers_are_equally_frequent_and_pictures_equally_bright(drawn: list[tuple[np.ndarray, bool]]) -> None:
    answers = [connected for _, connected in drawn]
    assert 0.3 < np.mean(answers) < 0.7
    light = [[picture.mean() for picture, connected in drawn if connected is answer] for answer in (True, False)]
    assert abs(np.mean(light[0]) - np.mean(light[1])) < np.std(light[0])  # there are as many dashes


def test_the_dots_are_ends_of_one_contour_or_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at what is rendered: the long contours are the first two times six dashes."""
    seen = []
    monkeypatch.setattr(pathfinder, "render", lambda config, dashes, dots: seen.append((dashes, dots)) or np.zeros(1))
    answers = [draw_pathfinder(EASY, seed=seed)[1] for seed in range(20)]
    assert set(answers) == {True, False}
    for (dashes, marked), connected in zip(seen, answers, strict=True):
        ends = {dashes[0][0]: 0, dashes[5][1]: 0, dashes[6][0]: 1, dashes[11][1]: 1}
        assert (ends[marked[0]] == ends[marked[1]]) == connected
        for contour in (dashes[:6], dashes[6:12]):
            for one, other in itertools.pairwise(contour):
                assert math.dist(one[1], other[0]) == pytest.approx(EASY.gap)
            assert all(math.dist(*dash) == pytest.approx(EASY.dash) for dash in contour)


def test_contours_keep_away_from_each_other() -> None:
    chance = np.random.default_rng(0)
    drawing = pathfinder._Drawing(EASY, chance)
    first, second = drawing.contour(6), drawing.contour(6)
    ends = [np.array([point for dash in contour for point in dash]) for contour in (first, second)]
    apart = np.sqrt(((ends[0][:, None] - ends[1]) ** 2).sum(-1)).min()
    assert apart >= EASY.padding + EASY.thickness - 1e-9


def test_a_seed_draws_the_same_again() -> None:
    assert np.array_equal(draw_pathfinder(EASY, seed=3)[0], draw_pathfinder(EASY, seed=3)[0])
    assert not np.array_equal(draw_pathfinder(EASY, seed=3)[0], draw_pathfinder(EASY, seed=4)[0])


@pytest.mark.parametrize("size", [32, 128])
def test_the_published_sizes_are_drawn(size: int) -> None:
    picture, _ = draw_pathfinder(pathfinder_config(size), seed=1)
    assert picture.shape == (size, size)
    assert 0.02 < (picture > 0).mean() < 0.6


def test_light_is_the_covered_share_of_a_pixel() -> None:
    config = PathfinderConfig(thickness=1.0, contrast=0.5)
    picture = render(config, [((4.0, 10.0), (20.0, 10.0))], ())
    assert (picture[10, 5:20] == 128).all()
    assert (picture[[9, 11], 5:20] == 0).all()
    assert picture[10, 24:].max() == 0
    half = render(config, [((4.0, 10.5), (20.0, 10.5))], ())
    assert (half[10:12, 5:20] == 64).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"size": 4}, "not 4"), ({"contrast": 0.0}, "contrast"), ({"contour_length": 2}, "not 32, 2")],
)
def test_a_wrong_setting_is_named(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        PathfinderConfig(**wrong)  # type: ignore[arg-type]


def test_what_finds_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "_PICTURE_TRIES", 5)
    with pytest.raises(TersorError, match="no picture of 16 pixels"):
        draw_pathfinder(PathfinderConfig(size=16, contour_length=12, seed_distance=40.0), seed=0)
    with pytest.raises(TersorError, match="32, 64, 128, 256 pixels a side, not 48"):
        pathfinder_config(48)
