"""A small, seeded k-means, e.g. for the anchor trajectories of DiffusionDrive."""

from __future__ import annotations

import numpy as np

from dipole.errors import DipoleError


def kmeans(points: np.ndarray, count: int, seed: int = 0, iterations: int = 100) -> np.ndarray:
    """Return `count` cluster centres of `points`, sorted by their first component.

    Lloyd's iteration from k-means++ seeds (Arthur & Vassilvitskii 2007). A cluster that loses all its points moves to
    the point farthest from every centre.

    Args:
        points: `[N, D]`.
        count: Number of centres, at most the number of different points.
        seed: Of the initial centres.
        iterations: Most iterations; it ends sooner when no point changes its cluster.

    Returns:
        float64 `[count, D]`.

    Raises:
        DipoleError: There are fewer different points than centres.
    """
    points = np.asarray(points, dtype=np.float64)
    distinct = len(np.unique(points, axis=0))
    if not 1 <= count <= distinct:
        raise DipoleError(f"{count} cluster centres of {distinct} different points: ask for 1 to {distinct}")
    centres = _seeds(points, count, np.random.default_rng(seed))
    owner = np.full(len(points), -1)
    for _ in range(iterations):
        distance = _squared_distances(points, centres)
        nearest = distance.argmin(1)
        if (nearest == owner).all():
            break
        owner = nearest
        for k in range(count):
            members = points[owner == k]
            centres[k] = members.mean(0) if len(members) else points[distance.min(1).argmax()]
    return centres[np.lexsort(centres.T[::-1])]


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return `[N, K]`."""
    cross = points @ centres.T
    squared: np.ndarray = (points**2).sum(1)[:, None] - 2 * cross + (centres**2).sum(1)
    return squared.clip(min=0)


def _seeds(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return k-means++ seeds: each further one is drawn with probability proportional to its squared distance."""
    chosen = [points[rng.integers(len(points))]]
    nearest = ((points - chosen[0]) ** 2).sum(1)
    while len(chosen) < count:
        chosen.append(points[rng.choice(len(points), p=nearest / nearest.sum())])
        nearest = np.minimum(nearest, ((points - chosen[-1]) ** 2).sum(1))
    return np.stack(chosen)
