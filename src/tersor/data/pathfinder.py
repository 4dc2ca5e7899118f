"""Pathfinder and Path-X: are the two dots the ends of one dashed contour? Pictures drawn by a generator of our own.

    picture, connected = draw_pathfinder(PathfinderConfig(), seed=0)          # (32, 32) uint8, True or False
    picture, connected = draw_pathfinder(pathfinder_config(128), seed=0)      # Path-X: 16,384 pixels

Every picture holds two long contours of `contour_length` dashes and some short ones that distract. A dot marks both ends
of one long contour (connected), or an end of each (not), with equal chances, and the dots are at least `seed_distance`
apart. Neither the drawing nor the places of the dots give the answer away: the contour has to be followed.

A contour grows dash by dash: after a gap, the next dash is turned by a normal deviate of `turn` radians, and dropped
where it would leave the picture or come nearer than `padding` pixels to what is there. A contour that finds no way is
begun anew.

Sizes are those that the Long Range Arena gave to the tool that drew its pictures (Linsley et al., NeurIPS 2018; contour
length 14, "hard"). That tool's own rules of growth are not ours, nor are the sizes that our sources do not say: dash
length at 64 and more, gap and turn. Accuracies are near the published ones at best, not comparable with them. Official
pictures are read by `tersor.data.long_range`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tersor.errors import TersorError

_DASH_TRIES, _CONTOUR_TRIES, _PICTURE_TRIES = 12, 60, 200


@dataclass(frozen=True, kw_only=True)
class PathfinderConfig:
    """Lengths are in pixels; the defaults are those of 32 x 32."""

    size: int = 32
    contour_length: int = 14  # dashes of the two long contours; the easier sets have 9
    distractors: int = 5  # short contours, of a third of the dashes
    dash: float = 2.0  # length of a dash
    gap: float = 1.0  # between two dashes of a contour
    thickness: float = 0.5
    contrast: float = 0.75  # brightness of dashes; dots have 1
    marker_radius: float = 1.5
    seed_distance: float = 7.0  # least distance of the two dots
    turn: float = 0.6  # radians, standard deviation
    margin: float = 1.0  # kept free along the edge
    padding: float = 1.0  # kept free around dashes

    def __post_init__(self) -> None:
        if self.size < 8 or self.contour_length < 3 or self.distractors < 0:
            raise TersorError(
                f"pathfinder needs size 8, contour_length 3 and distractors 0 at least, not {self.size}, "
                f"{self.contour_length} and {self.distractors}"
            )
        if min(self.dash, self.gap, self.thickness, self.marker_radius) <= 0 or not 0 < self.contrast <= 1:
            raise TersorError(
                "pathfinder's dash, gap, thickness, marker_radius and contrast are above 0, contrast up to 1"
            )


_OF_SIZE: dict[int, dict[str, float]] = {
    32: {},
    64: {"marker_radius": 2.5, "thickness": 1.0, "seed_distance": 12.0, "dash": 4.0, "gap": 2.0},
    128: {
        "marker_radius": 3.0,
        "thickness": 1.5,
        "seed_distance": 20.0,
        "contrast": 0.9,
        "dash": 5.0,
        "gap": 2.5,
        "margin": 3.0,
        "distractors": 8,
    },
    256: {
        "marker_radius": 5.0,
        "thickness": 2.0,
        "seed_distance": 40.0,
        "contrast": 0.9,
        "dash": 10.0,
        "gap": 5.0,
        "margin": 6.0,
        "distractors": 7,
    },
}


def pathfinder_config(size: int) -> PathfinderConfig:
    """The settings of the benchmark for pictures of 32, 64, 128 (Path-X) or 256 pixels a side."""
    if size not in _OF_SIZE:
        raise TersorError(f"pathfinder pictures have {', '.join(map(str, _OF_SIZE))} pixels a side, not {size}")
    return PathfinderConfig(size=size, **_OF_SIZE[size])  # type: ignore[arg-type]


def draw_pathfinder(config: PathfinderConfig, *, seed: int) -> tuple[np.ndarray, bool]:
    """A picture (size, size), uint8, and whether its dots are connected. The same seed draws the same picture."""
    chance = np.random.default_rng(seed)
    connected = bool(chance.integers(2))
    for _ in range(_PICTURE_TRIES):
        drawn = _Drawing(config, chance)
        long = [drawn.contour(config.contour_length) for _ in range(2)]
        if not all(long):
            continue
        ends = [(contour[0][0], contour[-1][1]) for contour in long]
        dots = ends[0] if connected else (ends[0][chance.integers(2)], ends[1][chance.integers(2)])
        if math.dist(*dots) < config.seed_distance:
            continue
        for _ in range(config.distractors):
            if not drawn.contour(config.contour_length // 3):
                break
        else:
            return render(config, drawn.dashes, dots), connected
    raise TersorError(
        f"no picture of {config.size} pixels a side holds these contours; fewer or shorter ones would fit"
    )


Point = tuple[float, float]
Dash = tuple[Point, Point]


class _Drawing:
    """The dashes so far, and a few points on each, from which new ones keep away."""

    def __init__(self, config: PathfinderConfig, chance: np.random.Generator) -> None:
        self.config, self.chance = config, chance
        self.dashes: list[Dash] = []
        steps = math.ceil(config.dash / 2) + 1
        self.shares = np.linspace(0, 1, steps)[:, None]
        self.points = np.empty((0, 2))

    def contour(self, length: int) -> list[Dash]:
        """A contour of `length` dashes that is now part of the drawing; empty where none was found."""
        low, high = self.config.margin, self.config.size - 1 - self.config.margin
        for _ in range(_CONTOUR_TRIES):
            start, angle = self.chance.uniform(low, high, 2), self.chance.uniform(0, 2 * math.pi)
            grown: list[Dash] = []
            points: list[np.ndarray] = []
            while len(grown) < length:
                turns = self.chance.normal(0, self.config.turn, _DASH_TRIES) * (len(grown) > 0)
                steps = np.stack((np.cos(angle + turns), np.sin(angle + turns)), -1)  # (tries, 2)
                there = start + self.shares * steps[:, None] * self.config.dash  # (tries, points, 2)
                free = self._is_free(there, points[:-1], low, high)
                if not free.any():
                    break
                chosen = int(free.argmax())
                angle += turns[chosen]
                points.append(there[chosen])
                grown.append((tuple(there[chosen, 0].tolist()), tuple(there[chosen, -1].tolist())))
                start = there[chosen, -1] + self.config.gap * steps[chosen]
            else:
                self.dashes += grown
                self.points = np.concatenate([self.points, *points])
                return grown
        return []

    def _is_free(self, there: np.ndarray, own: list[np.ndarray], low: float, high: float) -> np.ndarray:
        """(tries,): whether a dash through the points stays inside and away from all dashes, but the one before it."""
        free = ((there >= low) & (there <= high)).all((1, 2))
        others = np.concatenate([self.points, *own])
        if len(others) and free.any():
            clear = self.config.padding + self.config.thickness
            free &= ((there[:, :, None] - others) ** 2).sum(-1).min((1, 2)) >= clear**2
        return np.asarray(free)


def render(config: PathfinderConfig, dashes: list[Dash], dots: tuple[Point, ...]) -> np.ndarray:
    """(size, size) uint8: what share of each pixel is covered, times the brightness; points are (x, y) = (column, row)."""
    light = np.zeros((config.size, config.size))
    for dash in dashes:
        _paint(light, dash, config.thickness / 2, config.contrast)
    for dot in dots:
        _paint(light, (dot, dot), config.marker_radius, 1.0)
    return np.asarray((255 * light).round().astype(np.uint8))


def _paint(light: np.ndarray, dash: Dash, radius: float, brightness: float) -> None:
    """All within `radius` of the dash, in place; a pixel on the edge gets the share of it that is covered."""
    (ax, ay), (bx, by) = dash
    reach = radius + 1
    left, top = max(0, math.floor(min(ax, bx) - reach)), max(0, math.floor(min(ay, by) - reach))
    part = light[top : math.ceil(max(ay, by) + reach) + 1, left : math.ceil(max(ax, bx) + reach) + 1]  # a view
    y, x = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
    dx, dy = bx - ax, by - ay
    share = np.clip(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
    away = np.sqrt((x - ax - share * dx) ** 2 + (y - ay - share * dy) ** 2)
    np.maximum(part, (radius + 0.5 - away).clip(0, 1) * brightness, out=part)
