"""The action queue: merges by hand. Numbers are chosen so that float64 holds them exactly, unless said otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipole.errors import DipoleError
from dipole.realtime.queue import ActionQueue, Merge


def chunk(*values):
    return np.array(values, dtype=np.float64)[:, None]


def plan(queue, now):
    return queue.ahead(now)[:, 0].tolist()


def merged(merge):
    """Return the plan at tick 2 after a chunk for ticks 0..5 (all 0) and one for ticks 1..8 (all 1) met there."""
    queue = ActionQueue(merge)
    queue.put(np.zeros((6, 1)), first=0, now=0)
    queue.advance(2)
    assert queue.put(np.ones((8, 1)), first=1, now=2) == 1
    return plan(queue, 2)


def test_merges_by_hand():
    assert merged(Merge("replace")) == [1, 1, 1, 1, 1, 1, 1]
    assert merged(Merge("weighted", new_weight=0.75)) == [0.75, 0.75, 0.75, 0.75, 1, 1, 1]
    assert merged(Merge("blend", blend_ticks=3)) == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert merged(Merge("blend", blend_ticks=7)) == [0.2, 0.4, 0.6, 0.8, 1, 1, 1]  # no longer than the overlap
    assert merged(Merge("ensemble", decay=0.0)) == [0.5, 0.5, 0.5, 0.5, 1, 1, 1]
    assert merged(Merge("append")) == [0, 0, 0, 0, 1, 1, 1]


def test_ensemble_is_the_weighted_mean_of_all_chunks_that_reached_a_tick():
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(5, 9, 2))
    queue, decay = ActionQueue(Merge("ensemble", decay=0.3)), 0.3
    for first in range(5):
        queue.put(chunks[first], first, now=first)
        action = queue.pop(first)
        values = np.stack([chunks[k][first - k] for k in range(first + 1)])  # the oldest first
        weights = np.exp(-decay * np.arange(first + 1))
        # Incremental and direct sums round differently, by a few units of the last of 16 digits.
        np.testing.assert_allclose(action, weights @ values / weights.sum(), rtol=1e-13, atol=1e-14)


def test_actions_come_out_at_their_tick_and_skipped_ticks_are_passed_over():
    queue = ActionQueue()
    assert queue.pop(0) is None
    queue.put(chunk(10, 11, 12, 13), first=0, now=0)
    assert queue.pop(0) == [10]
    assert queue.remaining(1) == 3
    assert queue.pop(2) == [12]
    assert queue.consumed == 3
    assert queue.pop(9) is None
    assert queue.consumed == 4
    assert queue.remaining(9) == 0


def test_a_chunk_that_comes_too_late_leaves_the_plan_alone():
    queue = ActionQueue()
    queue.put(chunk(1, 2, 3, 4, 5), first=0, now=0)
    assert queue.put(chunk(7, 8), first=0, now=3) == 2
    assert plan(queue, 3) == [4, 5]
    empty = ActionQueue()
    assert empty.put(chunk(7, 8), first=0, now=3) == 2
    assert empty.pop(3) is None


def test_the_queue_keeps_its_own_copy():
    queue, actions = ActionQueue(), chunk(1, 2)
    queue.put(actions, 0, 0)
    actions[:] = 9
    assert queue.pop(0) == [1]


def test_clearing_forgets():
    queue = ActionQueue()
    queue.put(chunk(1, 2), 0, 0)
    queue.clear()
    assert queue.pop(0) is None
    assert queue.ahead(0) is None or not len(queue.ahead(0))


def test_a_chunk_of_the_future_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="for tick 4, but it is only tick 3"):
        ActionQueue().put(chunk(1), first=4, now=3)


@pytest.mark.parametrize(
    "wrong", [{"policy": "mean"}, {"new_weight": 1.5}, {"blend_ticks": 0}, {"decay": -1.0}], ids=lambda w: next(iter(w))
)
def test_wrong_merges_are_reported(wrong):
    with pytest.raises(DipoleError):
        Merge(**wrong)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["replace", "weighted", "blend", "ensemble", "append"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 6)), max_size=8),
    st.sampled_from([np.float32, np.float64]),
)
def test_every_merge_stays_within_the_chunks_and_never_leaves_a_gap(policy, events, dtype):
    queue, now, rng = ActionQueue(Merge(policy)), 0, np.random.default_rng(0)
    low, high = np.inf, -np.inf
    for skip, age, length in events:
        now += skip
        before = queue.remaining(now)
        actions = rng.normal(size=(length, 1)).astype(dtype)
        queue.put(actions, now - age, now)
        low, high = min(low, actions.min()), max(high, actions.max())
        fresh = max(0, length - age)
        assert queue.remaining(now) == (max(before, fresh) if policy == "append" or fresh == 0 else fresh)
        for value in queue.ahead(now):
            # A mean of two numbers may round to just outside of them.
            assert low - 1e-6 <= value[0] <= high + 1e-6
            assert value.dtype == dtype
