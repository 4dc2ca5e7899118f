"""Recorded runs of simulated systems under controllers of many gains: states and actions, without rewards.

    states, actions = control_runs("pendulum", 500, steps=60, seed=0)        # (500, 60, 3), (500, 60, 1)

    point-mass   positions x, y and velocities; forces         n = 4, m = 2
    pendulum     cos, sin and rate of its angle; torque        n = 3, m = 1     hanging is angle pi, up is 0
    cart-pole    place, speed, angle, rate; force              n = 4, m = 1

Each run has a start and a controller of its own: u = -K s, K the LQR gain of the system linearised at rest (up)
for costs drawn between a tenth and ten times the standard ones, plus normal noise of `noise` times the largest action, cut to
what the system allows. Steps are of 0.05 s, semi-implicit Euler. The pendulum swings up by energy until it is near the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError

Floats = NDArray[np.float64]
STEP, GRAVITY = 0.05, 9.81


@dataclass(frozen=True)
class System:
    """x [k] is integrated; the state [n] is what is seen of it."""

    rate: Callable[[Floats, Floats], Floats]  # (x, u) -> dx / dt
    seen: Callable[[Floats], Floats]
    width: int  # k
    actions: int  # m
    largest: float  # |u|
    start: tuple[float, ...]  # |x| at most, at the start


def _point_mass(x: Floats, u: Floats) -> Floats:
    return np.concatenate((x[2:], u - 0.1 * x[2:]))


def _pendulum(x: Floats, u: Floats) -> Floats:
    return np.array([x[1], GRAVITY * np.sin(x[0]) + u[0]])


def _cart_pole(x: Floats, u: Floats) -> Floats:
    """Barto's: a cart of 1 kg, a pole of 0.1 kg and a metre."""
    mass, pole, half = 1.1, 0.1, 0.5
    push = (u[0] + pole * half * x[3] ** 2 * np.sin(x[2])) / mass
    turn = (GRAVITY * np.sin(x[2]) - np.cos(x[2]) * push) / (half * (4 / 3 - pole * np.cos(x[2]) ** 2 / mass))
    return np.array([x[1], push - pole * half * turn * np.cos(x[2]) / mass, x[3], turn])


SYSTEMS = {
    "point-mass": System(_point_mass, lambda x: x, 4, 2, 2.0, (1.0, 1.0, 0.5, 0.5)),
    "pendulum": System(_pendulum, lambda x: np.array([np.cos(x[0]), np.sin(x[0]), x[1]]), 2, 1, 5.0, (3.1, 1.0)),
    "cart-pole": System(_cart_pole, lambda x: x, 4, 1, 10.0, (0.5, 0.2, 0.2, 0.2)),
}


def control_runs(name: str, count: int, *, steps: int, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """states [count, steps, n] and the actions [count, steps, m] taken in them, float32."""
    if name not in SYSTEMS:
        raise TersorError(f"a simulated system is one of {', '.join(SYSTEMS)}, not {name!r}")
    if count < 1 or steps < 1 or not noise >= 0:
        raise TersorError(f"there are no {count} runs of {steps} steps with noise {noise}")
    system = SYSTEMS[name]
    runs = [_run(system, steps, noise, np.random.default_rng(mixed_seed(seed, run))) for run in range(count)]
    states, actions = (np.stack(each).astype(np.float32) for each in zip(*runs, strict=True))
    return torch.from_numpy(states), torch.from_numpy(actions)


def _run(system: System, steps: int, noise: float, random: np.random.Generator) -> tuple[Floats, Floats]:
    weights = 10 ** random.uniform(-1, 1, system.width + system.actions)
    gain = lqr_gain(system, weights)
    x = random.uniform(-1, 1, system.width) * system.start
    states, actions = [], []
    for _ in range(steps):
        u = -gain @ x
        if system.rate is _pendulum and abs(np.arctan2(np.sin(x[0]), np.cos(x[0]))) > 0.5:
            energy = x[1] ** 2 / 2 + GRAVITY * (np.cos(x[0]) - 1)
            u = np.array([-energy * np.sign(x[1] or 1.0)])
        elif system.rate is _pendulum:
            u = -gain @ np.array([np.arctan2(np.sin(x[0]), np.cos(x[0])), x[1]])
        u = np.clip(
            u + noise * system.largest * random.standard_normal(system.actions), -system.largest, system.largest
        )
        states.append(system.seen(x))
        actions.append(u)
        x = advanced(system, x, u)
    return np.stack(states), np.stack(actions)


def advanced(system: System, x: Floats, u: Floats) -> Floats:
    """One step: speeds first, then places with the new speeds."""
    new = x + STEP * system.rate(x, u)
    rates = system.rate(new, u)
    if system.rate is _cart_pole:
        new[[0, 2]] = x[[0, 2]] + STEP * rates[[0, 2]]
    else:
        half = system.width // 2
        new[:half] = x[:half] + STEP * rates[:half]
    return new


def lqr_gain(system: System, weights: Floats) -> Floats:
    """K [m, k] of u = -K x for the costs diag(weights) of x and u, linearised at rest: Riccati's equation by iteration."""
    k, m, small = system.width, system.actions, 1e-5
    rest, none = np.zeros(k), np.zeros(m)
    A = np.stack([(advanced(system, e, none) - advanced(system, rest, none)) / small for e in small * np.eye(k)], 1)
    B = np.stack([(advanced(system, rest, e) - advanced(system, rest, none)) / small for e in small * np.eye(m)], 1)
    Q, R = np.diag(weights[:k]), np.diag(weights[k:])
    P = Q
    for _ in range(400):
        K = np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
        P = Q + A.T @ P @ (A - B @ K)
    return np.asarray(K)
