"""The driving score: every part on scenes whose answer is known, and the diversity of paths."""

from dataclasses import replace

import numpy as np
import pytest

from dipole.evaluation.driving import Drive, collides, comfortable, diversity, driving_score, keeps_distance, overlap

FAR = [1e4, 0.0, 0.0, 2.0, 1.0]


def drive(speeds, obstacle=FAR, start_speed=None, off_road=False, reference=None, moving=0.0):
    """Return one drive along x with these speeds, 0.5 s each, and one obstacle that moves along x."""
    x = np.concatenate([[0.0], np.cumsum(speeds) * 0.5])
    poses = np.stack([x, np.zeros_like(x), np.zeros_like(x)], axis=-1)[None]
    boxes = np.broadcast_to(np.array(obstacle, dtype=np.float64), (1, len(x), 1, 5)).copy()
    boxes[0, :, 0, 0] += moving * 0.5 * np.arange(len(x))
    return Drive(
        poses,
        boxes,
        (2.0, 0.9),
        0.5,
        np.array([speeds[0] if start_speed is None else start_speed]),
        np.array([off_road]),
        np.array([x[-1] if reference is None else reference]),
    )


def test_boxes_overlap_by_their_separating_axes():
    unit = np.array([0, 0, 0, 1.0, 1.0])
    assert overlap(unit, np.array([1.9, 0, 0, 1.0, 1.0]))
    assert not overlap(unit, np.array([2.0, 0, 0, 1.0, 1.0]))  # touching
    # A square on its corner reaches sqrt(2) along x, but its corner passes the other's corner on the diagonal.
    turned = np.array([2.4, 0, np.pi / 4, 1.0, 1.0])
    assert overlap(unit, turned)
    assert not overlap(unit, turned + np.array([0.02, 0, 0, 0, 0]))
    assert not overlap(unit, np.array([1.9, 1.9, np.pi / 4, 1.0, 1.0]))
    assert overlap(unit, np.array([1.6, 1.6, np.pi / 4, 1.0, 1.0]))
    np.testing.assert_array_equal(overlap(turned, unit), overlap(unit, turned))


def test_a_free_and_even_drive_is_perfect():
    scores = driving_score(drive([8.0] * 8))
    assert {name: value.item() for name, value in scores.items()} == dict.fromkeys(scores, 1.0)


def test_a_collision_or_leaving_the_road_is_worth_nothing():
    wall = [20.0, 0.0, 0.0, 2.0, 1.0]
    for case in (drive([8.0] * 8, wall), drive([8.0] * 8, off_road=True)):
        scores = driving_score(case)
        assert scores["score"] == 0
        assert scores["progress"] == 1
    # A fast car does not jump over a thin wall between two poses.
    assert collides(drive([40.0] * 2, [8.0, 0.0, 0.0, 0.1, 1.0]))
    assert not collides(drive([8.0] * 8, [20.0, 1.95, 0.0, 2.0, 1.0]))


def test_time_to_collision():
    # After 2 s at 8 m/s the nose is at 18 m; a wall whose near side is at 25 m is 0.875 s away.
    near = drive([8.0] * 4, [27.0, 0.0, 0.0, 2.0, 1.0])
    assert not collides(near)
    assert not keeps_distance(near)
    assert keeps_distance(drive([8.0] * 4, [29.0, 0.0, 0.0, 2.0, 1.0]))  # 1.125 s
    assert keeps_distance(drive([8.0] * 4, [12.0, 0.0, 0.0, 2.0, 1.0], moving=8.0))  # behind another car as fast
    stopped = drive([8.0, 6.0, 3.0, 1.0, 0.0, 0.0], [13.2, 0.0, 0.0, 2.0, 1.0])
    assert not keeps_distance(stopped)  # while it still drove
    assert driving_score(near)["score"] == pytest.approx(7 / 12)


def test_comfort_and_progress():
    assert not comfortable(drive([8.0, 3.0]))  # -10 m/s^2
    assert not comfortable(drive([8.0] * 4, start_speed=5.0))  # 6 m/s^2 at once
    assert comfortable(drive([8.0, 7.0, 6.0]))  # -2 m/s^2, jerk 4
    assert driving_score(drive([4.0] * 8, reference=32.0))["progress"] == pytest.approx(0.5)
    assert driving_score(drive([0.0] * 8, reference=0.0))["progress"] == 1
    sideways = drive([8.0] * 4)
    poses = sideways.poses.copy()
    poses[0, :, 1] = [0, 0, 2.0, 2.0, 2.0]  # 8 m/s^2 across
    assert not comfortable(replace(sideways, poses=poses))


def test_diversity():
    path = np.stack([np.arange(1.0, 9), np.zeros(8)], axis=-1)
    assert diversity(np.stack([path] * 5)) == pytest.approx(0)
    apart = np.stack([path + np.array([0, 10 * k]) for k in range(5)])
    # equal swaths but for cells cut differently by the grid
    assert diversity(apart) == pytest.approx(1 - 1 / 5, abs=0.01)
    assert 0 < diversity(np.stack([path, path + np.array([0, 0.9])])) < 0.5
