"""Rate keeping and delays, in simulated time. 8 Hz: a period of 1/8 s is exact in binary, so no tolerance is needed."""

import itertools

import numpy as np
import pytest

from dipole.realtime.clock import SimulatedClock, SystemClock
from dipole.realtime.delay import DelayTracker
from dipole.realtime.rate import RateKeeper

PERIOD = 0.125


def test_work_does_not_shift_the_deadlines():
    clock = SimulatedClock(start=1000.0)
    rate = RateKeeper(8.0, clock)
    begun = []
    for _ in range(50):
        rate.wait()
        begun.append(clock.now())
        clock.advance(0.0625)
    np.testing.assert_array_equal(begun, 1000.0 + PERIOD * np.arange(50))
    report = rate.report()
    assert (report.ticks, report.missed, report.jitter_ms.max) == (50, 0, 0.0)


def test_oversleeping_is_jitter_and_is_not_carried_on():
    late = itertools.cycle([0.0, 0.015625, 0.03125, 0.0])
    clock = SimulatedClock(oversleep=lambda: next(late))
    rate = RateKeeper(8.0, clock)
    ticks = [rate.wait() for _ in range(9)]
    assert ticks == list(range(9))
    jitter = rate.report().jitter_ms
    assert jitter.max == 31.25
    assert jitter.p50 == 0.0
    assert jitter.p99 == pytest.approx(31.25)  # a percentile of 9 values is interpolated
    assert rate.missed == 0
    assert clock.now() == 8 * PERIOD  # the last sleep was punctual


def test_missed_ticks_are_skipped_and_counted_not_caught_up():
    clock = SimulatedClock()
    rate = RateKeeper(8.0, clock)
    assert [rate.wait(), rate.wait()] == [0, 1]
    clock.advance(3.5 * PERIOD)  # tick 1 took until the middle of tick 4
    assert rate.wait() == 4
    assert rate.report().jitter_ms.max == 1000 * PERIOD / 2
    assert rate.wait() == 5  # back on time, no burst
    assert clock.now() == 5 * PERIOD
    assert rate.report().missed == 2
    rate.reset()
    assert rate.wait() == 0
    assert rate.report().missed == 0


def test_rates_that_are_not_exact_do_not_miss_ticks_by_rounding():
    for fps in (3.0, 30.0, 49.7, 80.0, 1000.0):
        clock = SimulatedClock(start=12345.678)
        rate = RateKeeper(fps, clock)
        assert [rate.wait() for _ in range(2000)] == list(range(2000))
        assert rate.missed == 0
        # A time of 1e4 s has 12 decimals: lateness is that rounding, nowhere near a millisecond.
        assert rate.report().jitter_ms.max < 1e-3


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_positive(fps):
    with pytest.raises(ValueError, match="fps"):
        RateKeeper(fps)


def test_the_estimate_is_the_largest_of_the_last_delays():
    tracker = DelayTracker(window=3, first=7.0)
    assert tracker.estimate == 7.0
    seen = []
    for delay in (1.0, 5.0, 2.0, 3.0, 1.0):
        tracker.add(delay)
        seen.append(tracker.estimate)
    assert seen == [1.0, 5.0, 5.0, 5.0, 3.0]
    figures = tracker.figures()
    assert (figures.count, figures.p50, figures.max) == (5, 2.0, 5.0)


def test_a_quantile_forgives_outliers():
    tracker = DelayTracker(window=10, quantile=0.9)
    for delay in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1000.0):
        tracker.add(delay)
    assert tracker.estimate == 9.0  # nine of ten do not exceed it


@pytest.mark.parametrize("delay", [-1.0, float("nan"), float("inf")])
def test_a_delay_must_be_a_time(delay):
    with pytest.raises(ValueError, match="delay"):
        DelayTracker().add(delay)


def test_trackers_and_clocks_refuse_nonsense():
    for wrong in ({"window": 0}, {"quantile": 0.0}, {"first": -1.0}):
        with pytest.raises(ValueError, match="must hold"):
            DelayTracker(**wrong)
    assert DelayTracker().figures().count == 0
    with pytest.raises(ValueError, match="backwards"):
        SimulatedClock().advance(-1.0)


def test_the_system_clock_sleeps():
    clock = SystemClock()
    deadline = clock.now() + 0.01
    clock.sleep_until(deadline)
    assert clock.now() >= deadline
    clock.sleep_until(deadline - 5.0)  # returns at once
