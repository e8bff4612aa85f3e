"""Collecting demonstrations: what is recorded, which episodes count, and that the number of rows changes nothing."""

import numpy as np
import pytest
from envs_helpers import needs

from dipole.envs import collect
from dipole.errors import DipoleError


def equal(first, second):
    return (
        np.array_equal(first.ends, second.ends)
        and first.columns.keys() == second.columns.keys()
        and all(np.array_equal(first.columns[key], second.columns[key]) for key in first.columns)
    )


def test_columns_and_flags():
    data = collect("micro/fork2d", 6, seed=3)
    assert data.num_episodes == 6
    assert data.tasks == ("Go to the goal round the disc.",)
    assert data.fps == 10.0
    assert set(data.columns) == {
        "observation.state",
        "action",
        "next.reward",
        "next.done",
        "next.truncated",
        "next.success",
        "task_index",
    }
    last = data.ends - 1
    ending = np.zeros(data.num_frames, dtype=bool)
    ending[last] = True
    for key in ("next.done", "next.success"):
        np.testing.assert_array_equal(data.columns[key][:, 0], ending)
    assert not data.columns["next.truncated"].any()
    np.testing.assert_array_equal(data.columns["next.reward"][:, 0], ending.astype(np.float32))


def test_observation_is_that_before_the_action():
    """The first frame is the start, and each action leads from its frame to the next."""
    data = collect("micro/fork2d", 3)
    for begin, end in zip(data.starts, data.ends, strict=True):
        p, a = data.columns["observation.state"][begin:end], data.columns["action"][begin:end]
        assert p[0, 1] == -1.0
        moved = p[:-1] + np.clip(a[:-1] - p[:-1], -0.12, 0.12)
        np.testing.assert_allclose(moved, p[1:], atol=1e-6)  # float32 of what was computed in float64


@pytest.mark.parametrize("name", ["micro/fork2d", "micro/grip2d", "micro/two_goal", "micro/multi8"])
def test_the_number_of_rows_changes_nothing(name):
    whole = collect(name, 12, noise=0.05)
    assert equal(whole, collect(name, 12, noise=0.05, num_envs=1))
    assert equal(whole, collect(name, 12, noise=0.05, num_envs=5))
    assert not equal(whole, collect(name, 12, noise=0.05, seed=100))
    # Asking for fewer gives the first ones.
    assert equal(whole.select(range(4)), collect(name, 4, noise=0.05))


def test_noise_and_labels():
    quiet = collect("micro/grip2d", 4)
    clean = collect("micro/grip2d", 4, noise=0.03)
    executed = collect("micro/grip2d", 4, noise=0.03, label="executed")
    # Noise changes what is seen; the label does not.
    assert not np.array_equal(quiet.columns["observation.state"][:20], clean.columns["observation.state"][:20])
    np.testing.assert_array_equal(clean.columns["observation.state"], executed.columns["observation.state"])
    noise = executed.columns["action"][:, :2] - clean.columns["action"][:, :2]
    # About 110 frames of two numbers: 5 % on a spread, three times over.
    assert noise.std() == pytest.approx(0.03, rel=0.15)
    # The clean gripper is exactly open or closed, the executed one is not, and bounds hold for both.
    assert set(np.unique(clean.columns["action"][:, 2])) == {-1.0, 1.0}
    assert len(np.unique(executed.columns["action"][:, 2])) > 4
    assert np.abs(executed.columns["action"][:, 2]).max() <= 1


def test_failures_are_left_out_or_kept():
    attempts = []
    # With noise of 0.35 some demonstrations hit the disc.
    good = collect("micro/fork2d", 10, noise=0.35, progress=lambda kept, done: attempts.append((kept, done)))
    assert attempts[-1][0] == 10
    assert attempts[-1][1] > 10
    assert all(good.columns["next.success"][good.ends - 1])
    everything = collect("micro/fork2d", 10, noise=0.35, success_only=False)
    assert not all(everything.columns["next.success"][everything.ends - 1])


def test_tasks_with_failures_by_design_keep_them():
    data = collect("micro/two_goal", 40)
    share = data.columns["next.success"][data.ends - 1].mean()
    assert 0.05 < share < 0.4  # 0.2 in the mean; 40 draws
    several = collect("micro/multi8", 10)
    assert len(several.tasks) == 8
    assert len(np.unique(several.columns["task_index"])) > 2


def test_mistakes_are_answered():
    with pytest.raises(DipoleError, match="no scripted expert"):
        collect("pusht", 1)
    with pytest.raises(DipoleError, match="num_episodes is 0"):
        collect("micro/fork2d", 0)
    with pytest.raises(DipoleError, match="noise is -1"):
        collect("micro/fork2d", 1, noise=-1.0)
    with pytest.raises(DipoleError, match=r"succeeded in \d+ of 30 attempts: lower the noise"):
        collect("micro/fork2d", 1, noise=50.0)
    with pytest.raises(DipoleError, match="unknown option"):
        collect("micro/fork2d", 1, images=True)


@needs("metaworld")
def test_a_simulators_episodes_go_on_shortly_after_success():
    data = collect("metaworld/reach-v3", 2)
    for begin, end in zip(data.starts, data.ends, strict=True):
        success = data.columns["next.success"][begin:end, 0]
        assert success.argmax() == end - begin - 6
        assert data.columns["next.done"][end - 1, 0]
    assert np.abs(data.columns["action"]).max() <= 1


@needs("metaworld")
def test_worker_processes_change_nothing():
    one = collect("metaworld/reach-v3", 3, noise=0.1)
    assert equal(one, collect("metaworld/reach-v3", 3, noise=0.1, num_envs=2))


@needs("metaworld")
def test_a_mistake_in_a_worker_is_answered_too():
    with pytest.raises(DipoleError, match="unknown option of environment"):
        collect("metaworld/reach-v3", 2, num_envs=2, picture=True)
