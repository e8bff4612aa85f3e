"""MetaDrive seen from above: drawn from the engine's state, as its own pictures need assets and a graphics card."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

# The view: cells along x (ahead) and y (left) in the ego vehicle's frame.
CELLS = (32, 32)
VIEW_LOW = np.array([-12.0, -16.0])
VIEW_CELL = np.array([2.0, 1.0])
CHANNELS = ("road", "route", "obstacle")
# Points a lane and a vehicle are drawn with are nearer to one another than the cells are wide.
_ALONG, _ACROSS = 0.9, 0.7


def to_ego(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return world points `[N, 2]` in the frame of `pose` (x, y, heading)."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    x, y = (points - pose[:2]).T
    return np.stack([cos * x + sin * y, cos * y - sin * x], axis=-1)


@dataclass(frozen=True)
class Road:
    """Points that cover all lanes of a map, `[N, 2]`, and which of them belong to the route, `[N]`."""

    points: np.ndarray
    on_route: np.ndarray


def survey(road_network: Any, checkpoints: list[str]) -> Road:
    """Return the road of a map, given the names of the nodes the route passes."""
    route = set(itertools.pairwise(checkpoints))
    points, flags = [], []
    for start, ends in road_network.graph.items():
        for end, lanes in ends.items():
            for lane in lanes:
                half = lane.width_at(0) / 2 - 1e-3
                along = np.linspace(0, lane.length, int(lane.length / _ALONG) + 2)
                across = np.linspace(-half, half, int(2 * half / _ACROSS) + 2)
                found = [lane.position(a, b) for a in along for b in across]
                points.append(np.array(found, dtype=np.float64))
                flags.append(np.full(len(found), (start, end) in route))
    return Road(np.concatenate(points), np.concatenate(flags))


def box_points(box: np.ndarray) -> np.ndarray:
    """Return points `[N, 2]` that cover a box (x, y, heading, half length, half width)."""
    x, y = (np.linspace(-half, half, int(2 * half / 0.5) + 2) for half in box[3:])
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)
    cos, sin = np.cos(box[2]), np.sin(box[2])
    turned = np.stack([cos * grid[:, 0] - sin * grid[:, 1], sin * grid[:, 0] + cos * grid[:, 1]], axis=-1)
    return np.asarray(box[:2] + turned)


def draw(road: Road, pose: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the view from `pose`, float32 `[32, 32, 3]`; `boxes` `[M, 5]` are the others, in the world's frame."""
    view = np.zeros((*CELLS, len(CHANNELS)), dtype=np.float32)
    near = np.abs(road.points - pose[:2]).max(1) < 80  # the view ends within 65 m
    _mark(view, 0, to_ego(road.points[near], pose))
    _mark(view, 1, to_ego(road.points[near & road.on_route], pose))
    for box in boxes:
        _mark(view, 2, to_ego(box_points(box), pose))
    return view


def _mark(view: np.ndarray, channel: int, points: np.ndarray) -> None:
    cell = np.floor((points - VIEW_LOW) / VIEW_CELL).astype(int)
    cell = cell[((cell >= 0) & (cell < np.array(CELLS))).all(1)]
    view[cell[:, 0], cell[:, 1], channel] = 1


def picture(view: np.ndarray, scale: int = 8) -> np.ndarray:
    """Return a view as a picture, uint8 `[256, 256, 3]`, driving to the right."""
    colour = np.full((*view.shape[:2], 3), 30, dtype=np.uint8)
    for channel, shade in enumerate(((120, 120, 120), (90, 150, 90), (220, 60, 50))):
        colour[view[..., channel] > 0] = shade
    ego = np.floor((np.zeros(2) - VIEW_LOW) / VIEW_CELL).astype(int)
    colour[ego[0], ego[1]] = (60, 110, 230)
    upright = colour.transpose(1, 0, 2)[::-1]  # x to the right, y up
    return np.ascontiguousarray(upright.repeat(scale, axis=0).repeat(scale, axis=1))
