"""How well a plan drives: a score in the manner of NAVSIM's PDMS, and the diversity of candidate paths.

score = (no collision) (drivable) (5 progress + 5 time to collision + 2 comfort) / 12

Every part is in [0, 1]; docs/howto/driving.md defines them. Source of the form and weights: Dauner et al., "NAVSIM:
Data-Driven Non-Reactive Autonomous Vehicle Simulation and Benchmarking" (2024); numbers are not comparable with
theirs, as scenes, horizon and time steps differ. Diversity: Liao et al., "DiffusionDrive" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WEIGHTS = {"progress": 5.0, "time_to_collision": 5.0, "comfort": 2.0}
# A vehicle that keeps its velocity must not hit anything within this time, in seconds.
HORIZON = 1.0
# What passengers find comfortable, in m/s^2 and m/s^3 (nuPlan's bounds).
ACCELERATION = (-4.05, 2.40)
LATERAL_ACCELERATION = 4.89
JERK = 8.37
# Intermediate places looked at on the way between two poses, and into the future.
_PARTS = 8
_STANDING = 0.1  # m/s below which there is no time to a collision


@dataclass(frozen=True)
class Drive:
    """Plans or drives of `n` scenes, start included.

    Attributes:
        poses: `[n, K+1, 3]` x, y (m) and heading (rad) of the ego's centre.
        obstacles: `[n, K+1, M, 5]` boxes (x, y, heading, half length, half width) at the same times; those that are not
            there are far away.
        ego: Half length and half width of the ego vehicle in m.
        dt: Seconds between poses.
        speed: `[n]` speed at the start in m/s.
        off_road: `[n]` bool, the ego left the drivable area.
        reference: `[n]` distance in m that a good and legal driver covers in the time.
    """

    poses: np.ndarray
    obstacles: np.ndarray
    ego: tuple[float, float]
    dt: float
    speed: np.ndarray
    off_road: np.ndarray
    reference: np.ndarray


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether boxes `a` and `b` `[..., 5]` overlap (separating axes); touching is not overlapping."""
    a, b = np.broadcast_arrays(a, b)
    between = b[..., :2] - a[..., :2]
    apart = np.zeros(a.shape[:-1], dtype=bool)
    for box, other in ((a, b), (b, a)):
        turn = box[..., 2] - other[..., 2]
        cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
        reach = np.stack([cos * other[..., 3] + sin * other[..., 4], sin * other[..., 3] + cos * other[..., 4]], -1)
        heading = box[..., 2]
        along = between[..., 0] * np.cos(heading) + between[..., 1] * np.sin(heading)
        across = between[..., 1] * np.cos(heading) - between[..., 0] * np.sin(heading)
        apart |= (np.abs(np.stack([along, across], -1)) >= box[..., 3:] + reach).any(-1)
    return ~apart


def _ego_boxes(drive: Drive, poses: np.ndarray) -> np.ndarray:
    size = np.broadcast_to(np.array(drive.ego), (*poses.shape[:-1], 2))
    return np.concatenate([poses, size], axis=-1)


def collides(drive: Drive) -> np.ndarray:
    """Return `[n]`: whether the ego, or the way between two of its poses, hits an obstacle."""
    share = ((np.arange(_PARTS) + 1) / _PARTS)[:, None]

    def between(values: np.ndarray) -> np.ndarray:
        first, second = values[:, :-1, None], values[:, 1:, None]
        places: np.ndarray = first + share.reshape(-1, *[1] * (values.ndim - 2)) * (second - first)
        return places

    ego = _ego_boxes(drive, between(drive.poses))
    hit: np.ndarray = overlap(ego[..., None, :], between(drive.obstacles))
    return np.asarray(hit.any((1, 2, 3)))


def keeps_distance(drive: Drive) -> np.ndarray:
    """Return `[n]`: whether at no pose a collision is less than `HORIZON` away at constant velocities."""
    way = np.diff(drive.poses[..., :2], axis=1) / drive.dt
    other = np.diff(drive.obstacles[..., :2], axis=1) / drive.dt
    safe = np.ones(len(way), dtype=bool)
    moving = np.linalg.norm(way, axis=-1) > _STANDING
    for ahead in HORIZON * (np.arange(_PARTS) + 1) / _PARTS:
        ego, boxes = drive.poses[:, 1:].copy(), drive.obstacles[:, 1:].copy()
        ego[..., :2] += ahead * way
        boxes[..., :2] += ahead * other
        hit = overlap(_ego_boxes(drive, ego)[..., None, :], boxes).any(-1)
        safe &= ~(hit & moving).any(1)
    return safe


def comfortable(drive: Drive) -> np.ndarray:
    """Return `[n]`: whether accelerations and jerk, by finite differences of the positions, stay within bounds."""
    heading = drive.poses[:, 0, 2]
    start = drive.speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    velocity = np.concatenate([start[:, None], np.diff(drive.poses[..., :2], axis=1) / drive.dt], axis=1)
    acceleration = np.diff(velocity, axis=1) / drive.dt
    jerk = np.linalg.norm(np.diff(acceleration, axis=1), axis=-1) / drive.dt
    cos, sin = np.cos(drive.poses[:, :-1, 2]), np.sin(drive.poses[:, :-1, 2])
    along = acceleration[..., 0] * cos + acceleration[..., 1] * sin
    across = acceleration[..., 1] * cos - acceleration[..., 0] * sin
    low, high = ACCELERATION
    fine = ((along >= low) & (along <= high) & (np.abs(across) <= LATERAL_ACCELERATION)).all(1)
    return np.asarray(fine & (jerk <= JERK).all(1))


def progress(drive: Drive) -> np.ndarray:
    """Return `[n]` the distance driven over the reference, at most 1; 1 where the reference stands still."""
    distance = np.linalg.norm(np.diff(drive.poses[..., :2], axis=1), axis=-1).sum(1)
    return np.where(drive.reference < _STANDING, 1.0, distance / np.maximum(drive.reference, _STANDING)).clip(0, 1)


def driving_score(drive: Drive) -> dict[str, np.ndarray]:
    """Return the parts of the score and `score` itself, each float64 `[n]`."""
    parts = {
        "no_collision": ~collides(drive),
        "drivable": ~drive.off_road,
        "progress": progress(drive),
        "time_to_collision": keeps_distance(drive),
        "comfort": comfortable(drive),
    }
    values = {name: np.asarray(value, dtype=np.float64) for name, value in parts.items()}
    weighted = np.sum([weight * values[name] for name, weight in WEIGHTS.items()], axis=0)
    score = values["no_collision"] * values["drivable"] * weighted / sum(WEIGHTS.values())
    return {**values, "score": score}


def diversity(paths: np.ndarray, half_width: float = 0.9, cell: float = 0.5) -> float:
    """Return D = 1 - mean over paths of the intersection over union of its swath with the union of all.

    Identical paths have D = 0; N disjoint ones of equal area have D = 1 - 1/N.

    Args:
        paths: `[N, T, 2]` in metres.
        half_width: Half the width of the swath.
        cell: Size of the cells areas are counted in.
    """
    low, high = paths.min((0, 1)) - half_width, paths.max((0, 1)) + half_width
    x, y = (np.arange(a + cell / 2, b + cell, cell) for a, b in zip(low, high, strict=True))
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)
    covered = np.stack([_swath(path, grid, half_width) for path in paths])
    union = covered.any(0).sum()
    return float(1 - (covered.sum(1) / union).mean())


def _swath(path: np.ndarray, grid: np.ndarray, half_width: float) -> np.ndarray:
    """Return which points of `grid` `[G, 2]` lie within `half_width` of the broken line `path` `[T, 2]`."""
    start, way = path[:-1], np.diff(path, axis=0)
    length = (way**2).sum(-1).clip(min=1e-12)
    share = (((grid[:, None] - start) * way).sum(-1) / length).clip(0, 1)
    distance = np.linalg.norm(grid[:, None] - start - share[..., None] * way, axis=-1)
    near: np.ndarray = (distance <= half_width).any(1)
    return near
