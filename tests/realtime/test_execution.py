"""The controller: what is executed, tick by tick, for answers that come late, never, twice or out of order.

Chunks name their own ticks: action k of the chunk for an observation of tick n is n + k / 100, so that from what was
executed one reads which chunk it came from and which of its actions it was.
"""

import math

import numpy as np
import pytest

from dipole.errors import DipoleError
from dipole.realtime.execution import MODES, Controller, Execution, execution_mode
from dipole.realtime.watchdog import Watchdog

TA, LENGTH = 4, 10


def chunk_for(tick):
    return tick + np.arange(LENGTH)[:, None] / 100


def drive(controller, delays, ticks, alive=lambda tick: True):
    """Return the actions of some ticks, as (observed, index) where planned, None where none, "!" for the fallback."""
    delays, under_way, seen = iter(delays), [], []
    for now in range(ticks):
        for _ in range(2):  # an answer without delay comes within the tick
            for item in [item for item in under_way if item[0] <= now]:
                under_way.remove(item)
                controller.deliver(item[1], chunk_for(item[1].tick), now)
            if controller.wants(now):
                request = controller.ask(now)
                delay = next(delays)
                if delay is not None:
                    under_way.append((now + delay, request))
        command = controller.act(now)
        value = None if command.action is None else float(command.action[0])
        planned = None if value is None else (math.floor(value + 1e-9), round(100 * (value - math.floor(value + 1e-9))))
        seen.append("!" if command.source == "fallback" else planned)
    return seen


def controller(mode, **options):
    execution = mode if isinstance(mode, Execution) else execution_mode(mode)
    return Controller(execution, 1, TA, 10.0, **options)


def constant(delay):
    while True:
        yield delay


@pytest.mark.parametrize("mode", ["sync", "async-naive", "async-drop", "rtc"])
def test_without_delay_modes_ask_every_ta_ticks_and_begin_at_the_beginning(mode):
    seen = drive(controller(mode), constant(0), 12)
    assert seen == [(4 * (k // 4), k % 4) for k in range(12)]


def test_sync_stands_still_while_it_waits():
    c = controller("sync")
    seen = drive(c, constant(2), 14)
    assert seen[:2] == [None, None]  # not started before the first chunk
    assert seen[2:] == [(0, 0), (0, 1), (0, 2), (0, 3), "!", "!", (6, 0), (6, 1), (6, 2), (6, 3), "!", "!"]
    assert c.counters.fallback == 4
    assert c.counters.stale == 0


def test_async_drop_never_stops_and_skips_what_was_executed_meanwhile():
    c = controller("async-drop")
    seen = drive(c, constant(2), 14)
    first = [None, None, (0, 0), (0, 1)]
    # Asked at tick 4 (Ta after the first): its first two actions are for ticks 4 and 5, which the old plan covers.
    assert seen == [*first, (0, 2), (0, 3), (4, 2), (4, 3), (4, 4), (4, 5), (8, 2), (8, 3), (8, 4), (8, 5)]
    assert c.counters.fallback == 0
    assert c.counters.stale == 4


def test_async_naive_begins_late_chunks_at_their_beginning():
    seen = drive(controller("async-naive"), constant(2), 12)
    assert seen[6:] == [(4, 0), (4, 1), (4, 2), (4, 3), (8, 0), (8, 1)]


def test_append_executes_the_old_plan_to_its_end():
    seen = drive(controller("async-append"), constant(1), 16)
    assert seen[1:11] == [(0, k) for k in range(10)]
    assert seen[11:16] == [(4, 7), (4, 8), (4, 9), (8, 6), (8, 7)]  # the chunk of tick 4 covers ticks 4 to 13


def test_actions_that_were_not_executed_are_not_skipped():
    # The plan ends 4 ticks before the answer: standing still, the robot executed 6 actions of the chunk's time.
    seen = drive(controller("async-drop"), iter([0, 10] + [10] * 5), 18)
    assert seen[:10] == [(0, k) for k in range(10)]
    assert seen[10:14] == ["!"] * 4
    assert seen[14] == (4, 6)  # observed at tick 4; ticks 4 to 9 were executed, 10 to 13 were not


def test_a_lost_answer_is_asked_for_again():
    c = controller("async-drop", retry=0.3)
    seen = drive(c, iter([0, None, 0, 0, 0]), 12)
    assert seen == [*((0, k) for k in range(7)), *((7, k) for k in range(4)), (11, 0)]
    assert (c.counters.requests, c.counters.lost) == (4, 1)


def test_an_answer_that_was_given_up_is_used_if_it_is_still_the_newest_and_ignored_otherwise():
    c = controller("async-drop", retry=0.2)
    first = c.ask(0)
    c.deliver(first, chunk_for(0), 0)
    late, second = c.ask(1), None
    assert not c.wants(2)
    assert c.wants(3)
    second = c.ask(3)
    c.deliver(second, chunk_for(3), 3)
    c.deliver(late, chunk_for(1), 4)
    assert c.counters.late == 1
    assert float(c.act(4).action[0]) == pytest.approx(3.01)


def test_an_error_is_asked_for_again_at_the_next_tick():
    c = controller("sync")
    request = c.ask(0)
    assert not c.wants(1)
    c.fail(request)
    assert c.wants(1)
    assert c.counters.failed == 1


def test_rtc_tells_what_is_planned_and_how_much_of_it_will_be_done():
    c = controller("rtc")
    assert len(c.ask(0).planned) == 0
    c.deliver(c.ask(0), chunk_for(0), 3)
    for now in range(3, 7):
        c.act(now)
    request = c.ask(7)
    np.testing.assert_array_equal(request.planned, chunk_for(0)[4:])
    assert (request.delay, request.executed) == (3, 4)
    c.deliver(request, chunk_for(7), 8)
    c.reset()
    assert c.ask(0).delay == 3  # the largest of the last: an episode's end does not make the network faster
    assert len(controller("async-drop").ask(0).planned) == 0


def test_skipped_ticks_pass_over_their_actions():
    c = controller("async-drop")
    c.deliver(c.ask(0), chunk_for(0), 0)
    assert float(c.act(0).action[0]) == 0.0
    assert float(c.act(3).action[0]) == 0.03


@pytest.mark.parametrize(("fallback", "expected"), [("last", 0.09), ("zero", 0.0), ("hold", 42.0)])
def test_fallbacks(fallback, expected):
    c = controller(Execution(fallback=fallback))
    hold = lambda: np.array([42.0])  # noqa: E731
    assert c.act(0, hold).action is None  # before the first chunk nothing is sent, whatever the fallback
    c.deliver(c.ask(0), chunk_for(0), 1)
    values = [float(c.act(now, hold).action[0]) for now in range(1, 13)]
    np.testing.assert_allclose(values[:10], chunk_for(0)[:, 0], rtol=0, atol=0)
    assert values[10:] == [expected] * 2
    assert c.counters.fallback == 2


def test_holding_needs_to_know_how():
    c = controller(Execution(fallback="hold"))
    c.deliver(c.ask(0), chunk_for(0)[:1], 0)
    c.act(0)
    with pytest.raises(DipoleError, match="pass hold"):
        c.act(1)


def test_the_watchdog_overrules_the_plan_and_a_fresh_chunk_brings_it_back():
    c = controller("async-drop", watchdog=Watchdog(0.5))
    c.deliver(c.ask(0), chunk_for(0), 0)
    commands = [c.act(now) for now in range(8)]
    assert [command.source for command in commands] == ["plan"] * 5 + ["fallback"] * 3  # 0.5 s are 5 ticks
    assert [command.state for command in commands[4:]] == ["running"] + ["stale"] * 3
    assert float(commands[7].action[0]) == 0.04  # stays at the last one that was sent
    c.deliver(c.ask(8), chunk_for(8), 8)
    command = c.act(8)
    assert (command.source, command.state, float(command.action[0])) == ("plan", "running", 8.0)
    assert (c.watchdog.counters.trips, c.watchdog.counters.recoveries) == (1, 1)


def test_after_giving_up_nothing_is_sent():
    c = controller("async-drop", watchdog=Watchdog(0.5, give_up=0.2))
    c.deliver(c.ask(0), chunk_for(0), 0)
    assert [c.act(now).source for now in range(9)] == ["plan"] * 5 + ["fallback"] * 2 + ["none"] * 2
    c.deliver(c.ask(9), chunk_for(9), 9)
    assert c.act(9).action is None


def test_random_delays_and_losses_never_stall_or_repeat():
    rng = np.random.default_rng(0)
    for mode in MODES:
        delays = (None if rng.uniform() < 0.2 else int(rng.integers(0, 6)) for _ in range(10_000))
        c = controller(mode, retry=0.7)
        seen = drive(c, delays, 500)
        started = next(k for k, item in enumerate(seen) if item is not None)
        assert None not in seen[started:]
        planned = [item for item in seen[started:] if item != "!"]
        assert len(planned) > 200  # of nearly 500: the robot is not left standing for good
        assert c.counters.requests > 40


def test_unknown_names_are_reported():
    with pytest.raises(DipoleError, match="unknown execution mode 'async-dorp': did you mean 'async-drop'"):
        execution_mode("async-dorp")
    with pytest.raises(DipoleError, match="unknown fallback"):
        Execution(fallback="stop")
    with pytest.raises(DipoleError, match="delay_window"):
        Execution(delay_window=0)
