"""Paths that scripted demonstrators follow: minimum-jerk curves and slowly varying noise."""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.cache
def _via_weights(num_steps: int) -> np.ndarray:
    """Return `[num_steps + 1, 3]`: how much start, via point and goal weigh at each step of a minimum-jerk curve.

    Two quintics on [0, 1] and [1, 2], at rest at both ends, that meet at the via point with equal derivatives up to the
    fourth: the minimum-jerk path through a point half-way in time (Flash & Hogan 1985, appendix A).
    """

    def row(t: float, order: int) -> list[float]:
        return [math.perm(k, order) * t ** (k - order) if k >= order else 0.0 for k in range(6)]

    zero = [0.0] * 6
    conditions = [row(0, order) + zero for order in range(3)]
    conditions += [zero + row(1, order) for order in range(3)]
    conditions += [row(1, 0) + zero, zero + row(0, 0)]
    conditions += [row(1, order) + [-v for v in row(0, order)] for order in range(1, 5)]
    values = np.zeros((12, 3))
    values[0, 0] = values[6, 1] = values[7, 1] = values[3, 2] = 1.0
    coefficients = np.linalg.solve(np.array(conditions), values)
    times = np.linspace(0, 2, num_steps + 1)
    weights = [
        np.array(row(t, 0)) @ coefficients[:6] if t < 1 else np.array(row(t - 1, 0)) @ coefficients[6:] for t in times
    ]
    return np.array(weights)


def min_jerk_via(start: np.ndarray, via: np.ndarray, goal: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the minimum-jerk path `[num_steps + 1, D]` from `start` through `via` (half-way in time) to `goal`."""
    return _via_weights(num_steps) @ np.stack([start, via, goal]).astype(np.float64)


def min_jerk(start: np.ndarray, goal: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the minimum-jerk path `[num_steps + 1, D]` from rest at `start` to rest at `goal`."""
    s = np.linspace(0, 1, num_steps + 1)[:, None]
    path: np.ndarray = start + (10 * s**3 - 15 * s**4 + 6 * s**5) * (np.asarray(goal, dtype=np.float64) - start)
    return path


def ornstein_uhlenbeck(
    rng: np.random.Generator, num_steps: int, size: int, std: float, decay: float = 0.8
) -> np.ndarray:
    """Return noise `[num_steps, size]` of stationary standard deviation `std` and one-step correlation `decay`."""
    white = rng.standard_normal((num_steps, size)) * std
    noise = np.empty_like(white)
    noise[0] = white[0]
    for k in range(1, num_steps):
        noise[k] = decay * noise[k - 1] + math.sqrt(1 - decay**2) * white[k]
    return noise
