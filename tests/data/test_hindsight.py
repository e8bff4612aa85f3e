"""Hindsight goals: after the window, in the same episode, uniform, and a function of the sample's number alone."""

import numpy as np
import pytest

from dipole.data import Episodes, Feature
from dipole.data.hindsight import HindsightWindows
from dipole.errors import DipoleError

LENGTHS = (5, 12, 3, 8)


@pytest.fixture
def episodes():
    """State is (episode, frame), so that every gathered row says where it came from."""
    states = [np.stack([np.full(n, e), np.arange(n)], 1).astype(np.float32) for e, n in enumerate(LENGTHS)]
    columns = {"observation.state": np.concatenate(states), "action": np.concatenate(states)}
    features = {key: Feature("float32", (2,)) for key in columns}
    return Episodes(features, columns, np.cumsum(LENGTHS), 10.0)


def test_windows_are_whole_and_goals_lie_after_them_in_the_same_episode(episodes):
    windows = HindsightWindows(episodes, ["observation.state"], window=4, goal_horizon=2, draws=50)
    # an episode of n frames has n - 3 windows of 4: 2 + 9 + 0 + 5
    assert len(windows) == 16 * 50
    batch = windows.batch(np.arange(len(windows)))
    state, goal, missing = batch["observation.state"], batch["goal.observation.state"], batch["goal_is_missing"]
    assert state.shape == (800, 4, 2)
    assert goal.shape == (800, 2, 2)
    assert (np.diff(state[..., 1], axis=1) == 1).all()
    assert (state[..., 0] == state[:, :1, 0]).all()
    assert np.array_equal(batch["action"], state)
    assert not batch["action_is_pad"].any()
    last = state[:, -1, 1]
    lengths = np.array(LENGTHS)[state[:, 0, 0].astype(int)]
    assert np.array_equal(missing, last + 2 >= lengths)  # two goal frames must follow the window
    assert (goal[~missing, :, 0] == state[~missing, :1, 0]).all()
    assert (goal[~missing, 0, 1] > last[~missing]).all()
    assert (goal[~missing, 1, 1] == goal[~missing, 0, 1] + 1).all()
    assert (goal[~missing, 1, 1] < lengths[~missing]).all()


def test_goals_are_uniform_over_what_is_left(episodes):
    draws = 8000
    windows = HindsightWindows(episodes, ["observation.state"], window=4, goal_horizon=1, draws=draws)
    index = 2 + np.arange(draws) * len(windows.first)  # window 2: the first of the episode of 12 frames
    goal = windows.batch(index)["goal.observation.state"][:, 0, 1].astype(int)
    counts = np.bincount(goal, minlength=12)[4:]
    assert counts.sum() == draws
    # eight equally likely frames: 1000 each, standard deviation 30; five of them are one in a million
    assert np.abs(counts - draws / 8).max() < 150


def test_samples_depend_on_their_number_and_the_seed_only(episodes):
    def goals(seed, index):
        windows = HindsightWindows(episodes, ["observation.state"], goal_horizon=1, seed=seed)
        return windows.batch(np.asarray(index))["goal.observation.state"]

    everything = np.arange(200)
    assert np.array_equal(goals(0, everything)[[7, 3]], goals(0, [7, 3]))
    assert not np.array_equal(goals(0, everything), goals(1, everything))


def test_mistakes_are_named(episodes):
    with pytest.raises(DipoleError, match="no episode has 13 frames"):
        HindsightWindows(episodes, ["observation.state"], window=13)
    with pytest.raises(DipoleError, match="at least 1"):
        HindsightWindows(episodes, ["observation.state"], draws=0)
    with pytest.raises(DipoleError, match=r"observation\.stat"):
        HindsightWindows(episodes, ["observation.stat"])
