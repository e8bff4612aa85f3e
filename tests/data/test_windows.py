import numpy as np
import pytest
from data_helpers import make_episodes
from hypothesis import given, settings
from hypothesis import strategies as st

from dipole.data import Episodes, Windows, split_episodes
from dipole.errors import DipoleError


def by_hand(lengths, to, tp, ta):
    """Return per window (frames of the observations, frames of the actions, padding), as the definition says."""
    windows, start = [], 0
    for length in lengths:
        for now in range(max(length - 1 - (tp - ta - to + 1), 0) + 1):
            obs = [start + min(max(now + k, 0), length - 1) for k in range(1 - to, 1)]
            wanted = [now + k for k in range(1 - to, tp - to + 1)]
            action = [start + min(max(k, 0), length - 1) for k in wanted]
            windows.append((obs, action, [not 0 <= k < length for k in wanted]))
        start += length
    return windows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 4))
def test_every_window_is_the_one_of_the_definition(lengths, to, ta, spare):
    tp = to + ta - 1 + spare
    frames = np.arange(sum(lengths))
    ends = np.cumsum(lengths)
    pieces = np.split(frames, ends[:-1])
    data = Episodes.from_list([{"action": p[:, None], "observation.state": 100.0 + p[:, None]} for p in pieces])
    windows = Windows(data, ["observation.state"], obs_horizon=to, pred_horizon=tp, action_horizon=ta)
    expected = by_hand(lengths, to, tp, ta)
    assert len(windows) == len(expected)
    batch = windows.batch(np.arange(len(windows)))
    np.testing.assert_array_equal(batch["observation.state"][..., 0] - 100, [obs for obs, _, _ in expected])
    np.testing.assert_array_equal(batch["action"][..., 0], [action for _, action, _ in expected])
    np.testing.assert_array_equal(batch["action_is_pad"], [pad for _, _, pad in expected])
    np.testing.assert_array_equal(windows.frames, [obs[-1] for obs, _, _ in expected])


def test_count_is_that_of_diffusion_policy():
    # Its sampler: starts run from -(To-1) to len - Tp + Ta - 1; for len 20, To 2, Tp 16, Ta 8 that is -1..11.
    data = make_episodes((20,))
    assert len(Windows(data, ["observation.state"], obs_horizon=2, pred_horizon=16, action_horizon=8)) == 13


def test_shapes_and_types():
    data = make_episodes((20, 9), cameras=["top"])
    windows = Windows(data, ["observation.state", "observation.images.top", "task_index"], obs_horizon=3)
    batch = windows.batch(np.array([0, 5, 5]))
    assert batch["observation.state"].shape == (3, 3, 4)
    assert batch["observation.images.top"].shape == (3, 3, 16, 18, 3)
    assert batch["task_index"].shape == (3, 3, 1)
    assert batch["action"].shape == (3, 16, 2)
    assert batch["action_is_pad"].dtype == bool
    assert {key: value.dtype for key, value in batch.items() if key in data.columns} == {
        key: data.columns[key].dtype for key in (*windows.obs_keys, "action")
    }


def test_large_rows_are_gathered_by_frame_and_equal_small_ones(monkeypatch):
    import dipole.data.windows as module

    data = make_episodes((20, 3, 9), cameras=["top"])
    keys = ["observation.state", "observation.images.top"]
    indices = np.arange(10)[::-1]
    small = Windows(data, keys).batch(indices)
    monkeypatch.setattr(module, "_SMALL_ROW_BYTES", 0)
    large = Windows(data, keys).batch(indices)
    for key in small:
        np.testing.assert_array_equal(small[key], large[key])


def test_a_batch_is_a_copy():
    data = make_episodes((20,))
    windows = Windows(data, ["observation.state"])
    first = windows.batch(np.array([3]))
    first["action"][:] = 0
    first["observation.state"][:] = 0
    assert (windows.batch(np.array([3]))["action"] != 0).all()
    assert (data.columns["action"] != 0).all()


def test_windows_outside_are_refused():
    windows = Windows(make_episodes((20,)), ["observation.state"])
    with pytest.raises(IndexError):
        windows.batch(np.array([len(windows)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_horizon": 2, "pred_horizon": 8, "action_horizon": 8}, "do not fit"),
        ({"obs_horizon": 0}, "do not fit"),
        ({"obs_keys": ["observation.force"]}, "no 'observation.force'"),
        ({"action_key": "torque"}, "no 'torque'"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(DipoleError, match=message):
        Windows(make_episodes(), **{"obs_keys": ["observation.state"], **options})


def test_texts_are_refused():
    data = Episodes.from_list([{"action": np.zeros((3, 2)), "note": np.array(["a", "b", "c"])}])
    with pytest.raises(DipoleError, match="'note' holds texts"):
        Windows(data, ["note"])


def test_split_is_a_partition_that_the_seed_decides():
    train, held_out = split_episodes(20, 0.25, seed=3)
    assert sorted([*train, *held_out]) == list(range(20))
    assert len(held_out) == 5
    assert (np.diff(train) > 0).all()
    np.testing.assert_array_equal(held_out, split_episodes(20, 0.25, seed=3)[1])
    assert list(held_out) != list(split_episodes(20, 0.25, seed=4)[1])
    # Diffusion Policy's rule, so that its splits can be had.
    np.testing.assert_array_equal(held_out, np.sort(np.random.default_rng(3).choice(20, size=5, replace=False)))


def test_split_keeps_an_episode_on_each_side():
    assert [len(part) for part in split_episodes(10, 0.0)] == [10, 0]
    assert [len(part) for part in split_episodes(3, 0.01)] == [2, 1]
    assert [len(part) for part in split_episodes(3, 0.99)] == [1, 2]
    with pytest.raises(DipoleError, match="one episode"):
        split_episodes(1, 0.1)
    with pytest.raises(DipoleError, match="share is 1"):
        split_episodes(5, 1)
