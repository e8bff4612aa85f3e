"""Planar poses: frames and increments are inverses of one another."""

import math

import torch

from dipole.data.poses import compose, decompose, from_frame, headings, to_frame, wrap


def poses(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy = 20 * torch.randn(*shape, 2, generator=g, dtype=torch.float64)
    return torch.cat([xy, 2 * math.pi * torch.rand(*shape, 1, generator=g, dtype=torch.float64) - math.pi], dim=-1)


def test_frames_are_inverses():
    pose, base = poses(50), poses(50, seed=1)
    # float64 rounding of numbers up to 60
    torch.testing.assert_close(from_frame(to_frame(pose, base), base), pose, atol=1e-12, rtol=0)
    torch.testing.assert_close(to_frame(base, base), torch.zeros_like(base), atol=1e-12, rtol=0)


def test_a_known_pose():
    base = torch.tensor([1.0, 2.0, math.pi / 2])
    ahead = torch.tensor([1.0, 5.0, math.pi])  # three metres ahead of a base that looks along y, turned left
    torch.testing.assert_close(to_frame(ahead, base), torch.tensor([3.0, 0.0, math.pi / 2]), atol=1e-6, rtol=0)


def test_increments_and_paths_are_inverses():
    path = poses(4, 7)
    torch.testing.assert_close(compose(decompose(path)), path, atol=1e-12, rtol=0)
    quarter = torch.tensor([[1.0, 0.0, math.pi / 2]]).expand(4, 3)  # four left turns lead back
    torch.testing.assert_close(compose(quarter)[-1, :2], torch.zeros(2), atol=1e-6, rtol=0)


def test_headings_follow_the_way_and_keep_it_while_standing():
    points = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.001], [0.0, 1.001]])
    torch.testing.assert_close(headings(points), torch.tensor([0.0, math.pi / 2, math.pi / 2, math.pi]))
    assert headings(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_wrapping():
    angle = torch.tensor([0.0, 3 * math.pi / 2, -3 * math.pi / 2])
    torch.testing.assert_close(wrap(angle), torch.tensor([0.0, -math.pi / 2, math.pi / 2]))
