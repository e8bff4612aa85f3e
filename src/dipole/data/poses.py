"""Planar poses (x, y, heading): relative to one another, as increments and as a path. Angles in radians."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(xy: Tensor, angle: Tensor) -> Tensor:
    """Return vectors `[..., 2]` turned by `angle` `[...]`."""
    cos, sin = angle.cos(), angle.sin()
    x, y = xy[..., 0], xy[..., 1]
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def wrap(angle: Tensor) -> Tensor:
    """Return angles in [-pi, pi]."""
    return torch.atan2(angle.sin(), angle.cos())


def to_frame(pose: Tensor, base: Tensor) -> Tensor:
    """Return poses `[..., 3]` as seen from `base` `[..., 3]`."""
    xy = rotate(pose[..., :2] - base[..., :2], -base[..., 2])
    return torch.cat([xy, wrap(pose[..., 2:] - base[..., 2:])], dim=-1)


def from_frame(pose: Tensor, base: Tensor) -> Tensor:
    """Return poses `[..., 3]` given in the frame `base` in that of `base` itself: the inverse of `to_frame`."""
    xy = base[..., :2] + rotate(pose[..., :2], base[..., 2])
    return torch.cat([xy, wrap(pose[..., 2:] + base[..., 2:])], dim=-1)


def compose(increments: Tensor) -> Tensor:
    """Return the path `[..., T, 3]` of increments `[..., T, 3]`, each given in the frame of the pose before it.

    The path starts at the origin, which is not part of it.
    """
    heading = increments[..., 2].cumsum(-1)
    before = torch.cat([torch.zeros_like(heading[..., :1]), heading[..., :-1]], dim=-1)
    xy = rotate(increments[..., :2], before).cumsum(-2)
    return torch.cat([xy, wrap(heading).unsqueeze(-1)], dim=-1)


def decompose(path: Tensor) -> Tensor:
    """Return the increments `[..., T, 3]` of a path `[..., T, 3]` that starts at the origin."""
    before = torch.cat([torch.zeros_like(path[..., :1, :]), path[..., :-1, :]], dim=-2)
    return to_frame(path, before)


def headings(points: Tensor, least: float = 0.05) -> Tensor:
    """Return the direction of travel `[..., T]` along points `[..., T, 2]` from the origin.

    A way shorter than `least` (the unit of the points) has the direction before it, at first 0.
    """
    way = torch.diff(points, dim=-2, prepend=torch.zeros_like(points[..., :1, :]))
    angle, moved = torch.atan2(way[..., 1], way[..., 0]), way.norm(dim=-1) >= least
    result, last = [], torch.zeros_like(angle[..., 0])
    for k in range(angle.shape[-1]):
        last = torch.where(moved[..., k], angle[..., k], last)
        result.append(last)
    return torch.stack(result, dim=-1)
