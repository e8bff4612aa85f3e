import pytest

from dipole.realtime.watchdog import Watchdog


def test_it_waits_runs_trips_and_recovers():
    dog = Watchdog(timeout=1.0)
    assert dog.check(100.0) == "waiting"  # nothing has come: nothing can be stale
    dog.feed(100.0)
    assert [dog.check(t) for t in (100.0, 100.5, 100.9375)] == ["running"] * 3
    assert [dog.check(t) for t in (101.0, 105.0)] == ["stale"] * 2
    dog.feed(104.5)
    assert dog.check(105.25) == "running"
    assert dog.check(105.5) == "stale"
    counters = dog.counters
    assert (counters.trips, counters.recoveries, counters.stops, counters.longest) == (2, 1, 0, 5.0)


def test_freshness_is_the_age_of_the_observation():
    dog = Watchdog(timeout=1.0)
    dog.feed(0.0)
    assert dog.check(2.0) == "stale"
    dog.feed(0.75)  # it has come now, but what it saw is long ago
    assert dog.check(2.0) == "stale"
    assert dog.counters.recoveries == 0
    dog.feed(1.5)
    assert dog.check(2.0) == "running"
    dog.feed(0.5)  # out of order
    assert dog.check(2.25) == "running"
    assert dog.check(2.5) == "stale"


def test_it_gives_up_for_good_until_it_is_reset():
    dog = Watchdog(timeout=1.0, give_up=2.0)
    dog.feed(0.0)
    assert [dog.check(t) for t in (1.0, 2.75, 3.0)] == ["stale", "stale", "stopped"]
    dog.feed(3.0)
    assert dog.check(3.0) == "stopped"
    assert (dog.counters.trips, dog.counters.stops) == (1, 1)
    dog.reset()
    assert dog.check(4.0) == "waiting"
    dog.feed(4.0)
    assert dog.check(4.0) == "running"


def test_a_gap_long_enough_to_give_up_is_seen_at_once():
    dog = Watchdog(timeout=1.0, give_up=2.0)
    dog.feed(0.0)
    assert dog.check(50.0) == "stopped"
    assert (dog.counters.trips, dog.counters.stops) == (1, 1)


def test_without_a_timeout_it_only_measures():
    dog = Watchdog()
    dog.feed(0.0)
    assert dog.check(1e6) == "running"
    assert dog.counters.longest == 1e6


@pytest.mark.parametrize("wrong", [{"timeout": 0.0}, {"timeout": 1.0, "give_up": -1.0}])
def test_wrong_times_are_a_mistake_of_the_caller(wrong):
    with pytest.raises(ValueError, match="positive"):
        Watchdog(**wrong)
