"""The loop beside the robot, in simulated time: 8 Hz, so that ticks are exact, and answers come when a test says."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest

from dipole.errors import DipoleError
from dipole.realtime.clock import SimulatedClock
from dipole.realtime.execution import MODES, Command, Request
from dipole.realtime.robot import LoopConfig, RobotLoop
from dipole.realtime.worker import Answer, Job, SimulatedWorker, ThreadWorker
from dipole.safety import Limits, OutputGuard, STLMonitor
from dipole.safety.monitor import Rule
from dipole.safety.stl import Join, Predicate, Within

FPS = 8.0
CONFIG = LoopConfig(fps=FPS, action_dim=1, every=4, obs_horizon=2, timeout_ms=None)


class Robot:
    """Its observation says how often it was looked at."""

    def __init__(self, loop=None, busy=()):
        self.sent, self.looks, self.busy, self.clock = [], 0, dict(busy), None

    def observe(self):
        self.looks += 1
        return {"observation.state": np.array([float(self.looks - 1)])}

    def send(self, action):
        self.sent.append(float(action[0]))
        if self.clock is not None:
            self.clock.advance(self.busy.get(self.looks - 1, 0.0))


def infer(job):
    """Return a chunk that says for which tick it is: n, n + 0.0625, ..."""
    return job.request.tick + np.arange(10)[:, None] / 16


def loop(config=CONFIG, delay=lambda: 0.0, infer=infer, **options):
    clock = SimulatedClock()
    return RobotLoop(config, SimulatedWorker(infer, clock, delay), clock=clock, **options)


def test_without_delay_it_does_as_the_policy_says():
    robot = Robot()
    report = loop().run(robot, ticks=8)
    assert robot.sent == [0, 0.0625, 0.125, 0.1875, 4, 4.0625, 4.125, 4.1875]
    assert report["execution"]["requests"] == 2
    assert report["rate"] == {"ticks": 8, "missed": 0, "jitter_ms": {"count": 8, "p50": 0, "p99": 0, "max": 0}}


def test_late_answers_are_aligned_and_their_delay_is_measured():
    robot = Robot()
    report = loop(delay=lambda: 0.25).run(robot, ticks=8)
    # The first chunk comes at tick 2 and begins there; the second is asked for at tick 4 and comes two actions later.
    assert robot.sent == [0, 0.0625, 0.125, 0.1875, 4.125, 4.1875]
    assert report["delay_ms"] == {"count": 2, "p50": 250.0, "p99": 250.0, "max": 250.0}
    assert report["execution"]["stale"] == 2


def test_requests_carry_the_last_observations_oldest_first():
    seen = []
    loop(infer=lambda job: seen.append(job.obs["observation.state"][:, 0].tolist()) or infer(job)).run(Robot(), ticks=9)
    assert seen == [[0, 0], [3, 4], [7, 8]]  # the first one repeated at the start


def test_a_slow_robot_makes_ticks_be_missed_and_their_actions_be_passed_over():
    driven = loop()
    robot = Robot(busy={1: 2.5 / FPS})  # tick 1 takes until the middle of tick 3
    robot.clock = driven.clock
    report = driven.run(robot, ticks=6)
    assert robot.sent == [0, 0.0625, 0.1875, 4, 4.0625]
    assert report["rate"]["missed"] == 1
    assert report["rate"]["jitter_ms"]["max"] == 62.5


def test_a_dead_server_is_noticed_held_for_and_recovered_from():
    down = {"server": False}
    config = replace(CONFIG, timeout_ms=1000.0, retry_ms=250.0)
    driven = loop(config, delay=lambda: None if down["server"] else 0.0)
    robot = Robot()
    driven.run(robot, ticks=8)
    down["server"] = True
    for tick in range(8, 20):
        command = driven.step(robot.observe(), tick)
    # The newest observation that was answered is that of tick 4; after 8 ticks (1 s) the plan is not trusted.
    assert (command.source, command.state) == ("fallback", "stale")
    assert driven.controller.counters.lost == 5  # asked at 8, 10, ..., 18: the last is still awaited
    down["server"] = False
    commands = [driven.step(robot.observe(), tick) for tick in range(20, 24)]
    assert commands[-1].state == "running"
    assert driven.report()["watchdog"]["recoveries"] == 1
    assert driven.report()["watchdog"]["trips"] == 1


def test_giving_up_ends_the_run():
    answers = iter([0.0])
    config = replace(CONFIG, timeout_ms=1000.0, give_up_ms=500.0)
    driven = loop(config, delay=lambda: next(answers, None))
    robot = Robot()
    report = driven.run(robot, ticks=1000)
    assert report["watchdog"]["state"] == "stopped"
    assert report["rate"]["ticks"] == 13  # 1.5 s are 12 ticks: in the thirteenth it stops
    assert len(robot.sent) == 12


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda job: np.full((4, 1), np.nan), "not finite"),
        (lambda job: np.zeros((4, 2)), "2 action dimensions, not 1"),
        (lambda job: np.zeros(4), r"shape \[4\]"),
        (lambda job: np.zeros((0, 1)), r"shape \[0, 1\]"),
        (lambda job: {}["missing"], "KeyError"),
    ],
    ids=["nan", "dimensions", "vector", "empty", "raises"],
)
def test_bad_answers_never_reach_the_robot(bad, message):
    driven = loop(infer=lambda job: bad(job) if job.request.tick >= 4 else infer(job))
    robot = Robot()
    report = driven.run(robot, ticks=12)
    assert robot.sent == [*(np.arange(10) / 16), 9 / 16, 9 / 16]  # the first chunk to its end, then its last action
    assert report["execution"]["failed"] == 8  # asked for again at every tick
    assert re.search(message, report["last_error"])


def test_the_guard_sees_every_action_with_the_one_sent_before():
    guard = OutputGuard(Limits((-1.0,), (1.0,), max_change=(0.25,)))
    robot = Robot()
    chunk = np.array([[0.5], [5.0], [0.75], [-5.0], [0.0]])
    config = replace(CONFIG, execution=replace(MODES["async-drop"], fallback="zero"), every=5)
    answers = iter([0.0])
    report = loop(config, lambda: next(answers, None), lambda job: chunk, guard=guard).run(robot, ticks=8)
    # The rate holds between chunk and fallback as well: from 0.25 to the fallback's 0.
    assert robot.sent == [0.5, 0.75, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert report["violations"] == {"limits": 2, "rate": 3, "refused": 0}


def test_the_fallback_repeats_what_was_sent_not_what_was_wanted():
    guard = OutputGuard(Limits((-9.0,), (9.0,), max_change=(0.25,)))
    robot, answers = Robot(), iter([0.0])
    wanted = np.array([[0.0], [5.0]])
    loop(delay=lambda: next(answers, None), infer=lambda job: wanted, guard=guard).run(robot, ticks=5)
    assert robot.sent == [0.0, 0.25, 0.25, 0.25, 0.25]  # it stands, it does not creep on towards 5


def test_a_refused_first_action_is_not_sent():
    guard = OutputGuard(Limits((-1.0,), (1.0,), on_limits="refuse"))
    robot = Robot()
    driven = loop(guard=guard, infer=lambda job: np.full((4, 1), 3.0 if job.request.tick == 0 else 0.5))
    report = driven.run(robot, ticks=6)
    assert robot.sent == [0.5, 0.5]
    assert "refused (limits)" in report["last_error"]


def test_a_monitor_remembers_what_was_sent():
    low = Predicate((("action[0]", 1.0),), 1.0, False)
    near = Predicate((("observation.state[0]", 1.0),), 5.0, False)
    rules = [Rule("rest", Within(low, (0, 2), False)), Rule("near", Join((near, low), False))]
    guard = OutputGuard(Limits(hold=(0.0,)), STLMonitor(rules))
    robot = Robot()  # observes 0, 1, 2, ...
    driven = loop(guard=guard, infer=lambda job: np.full((4, 1), 2.0))
    report = driven.run(robot, ticks=9)
    # Every third tick must rest, and from the observation 6 on nothing above 1 is sent.
    assert robot.sent == [2, 2, 0, 2, 2, 0, 0, 0, 0]
    assert report["violations"] == {"monitor": 5, "refused": 5}
    driven.reset()
    assert driven.step({"observation.state": np.zeros(1)}, 9).action == 2  # the last episode's ticks are forgotten


def test_a_tick_without_an_action_breaks_the_monitors_trace(monkeypatch):
    low = Predicate((("action[0]", 1.0),), 1.0, False)
    guard = OutputGuard(Limits(hold=(0.0,)), STLMonitor([Rule("rest", Within(low, (0, 2), False))]))
    driven = loop(guard=guard)
    wanted = iter([2.0, 2.0, None, 2.0, 2.0, 2.0])

    def act(tick, hold):
        value = next(wanted)
        return Command(None if value is None else np.array([value]), "chunk", "running")

    monkeypatch.setattr(driven.controller, "act", act)
    obs = {"observation.state": np.zeros(1)}
    sent = [driven.step(obs, tick).action for tick in range(6)]
    # Every third tick in a row must rest: counted anew after the one at which nothing was sent.
    assert [None if action is None else float(action[0]) for action in sent] == [2, 2, None, 2, 2, 0]


def steps(driven, *seen):
    """Return what is sent at ticks, given as (tick, observation)."""
    return [float(driven.step({"observation.state": np.array([state])}, tick).action[0]) for tick, state in seen]


def test_missed_ticks_count_for_the_monitor_with_the_action_that_was_in_force():
    low = Predicate((("action[0]", 1.0),), 1.0, False)
    guard = OutputGuard(Limits(hold=(0.0,)), STLMonitor([Rule("rest", Within(low, (0, 2), False))]))
    driven = loop(guard=guard, infer=lambda job: np.full((4, 1), 2.0))
    # Every third tick must rest: at 2 it is the third, although nothing was sent at 1.
    assert steps(driven, (0, 0.0), (2, 0.0)) == [2, 0]
    assert guard.counts == {"monitor": 1, "refused": 1}
    driven.reset()
    # At 3 it is too late: 0, 1 and 2 broke the rule already, which is counted, but there was nothing to refuse.
    assert steps(driven, (0, 0.0), (3, 0.0)) == [2, 0]
    assert guard.counts == {"monitor": 1 + 2, "refused": 1 + 1}
    driven.reset()
    assert steps(driven, (5, 0.0), (6, 0.0)) == [2, 2]  # nothing is missing before an episode's first tick


def test_missed_ticks_count_for_the_monitor_with_the_observation_before_them():
    near = Predicate((("observation.state[0]", 1.0),), 5.0, False)
    guard = OutputGuard(Limits(on_monitor="report"), STLMonitor([Rule("near", Within(near, (0, 1), False))]))
    # Of two ticks in a row one must be near: 0, [0, 0,] 9, 0 is, 0, [0, 0,] 9, 9 is not, nor is 9, [9, 9,] 0.
    assert steps(loop(guard=guard), (0, 0.0), (3, 9.0), (4, 0.0)) == [0, 0.1875, 4]
    assert guard.counts == {"refused": 0}
    steps(loop(guard=guard), (0, 0.0), (3, 9.0), (4, 9.0))
    assert guard.counts["monitor"] == 1
    steps(loop(guard=guard), (0, 9.0), (3, 0.0))
    assert guard.counts["monitor"] == 1 + 2


def test_answers_of_the_last_episode_are_ignored():
    driven = loop(delay=lambda: 0.25)
    driven.step({"observation.state": np.zeros(1)}, 0)
    driven.reset()
    driven.clock.advance(0.5)
    assert driven.step({"observation.state": np.zeros(1)}, 0).action is None
    assert driven.controller.counters.requests == 1


def test_configurations_that_make_no_sense_are_reported():
    with pytest.raises(DipoleError, match="needs hold"):
        loop(replace(CONFIG, execution=replace(MODES["sync"], fallback="hold")))
    with pytest.raises(DipoleError, match="must be positive"):
        LoopConfig(fps=0.0, action_dim=1, every=1)
    with pytest.raises(DipoleError, match="timeout_ms"):
        LoopConfig(fps=10.0, action_dim=1, every=1, timeout_ms=0.0)


def job(tick):
    return Job(Request(tick, tick, np.zeros((0, 1)), 0, 0), {}, 0.0, 0)


def collect(worker, count):
    """Return the first answers; no clock: the test's own time limit ends a worker that gives none."""
    answers, pause = [], threading.Event()
    while len(answers) < count:
        answers += worker.poll()
        pause.wait(0.001)
    return answers


def test_a_thread_computes_while_the_caller_goes_on_and_only_the_newest_job_waits():
    may_go, begun = threading.Event(), threading.Event()

    def slow(job):
        begun.set()
        may_go.wait()
        return infer(job)

    worker = ThreadWorker(slow)
    worker.submit(job(0))
    begun.wait()
    for tick in (1, 2, 3):  # the robot's loop is not held up by a worker that is busy
        worker.submit(job(tick))
        assert worker.poll() == []
    may_go.set()
    answers = collect(worker, 2)
    assert [answer.job.request.tick for answer in answers] == [0, 3]
    np.testing.assert_array_equal(answers[1].chunk, infer(job(3)))
    worker.close()
    worker.close()
    with pytest.raises(ValueError, match="closed"):
        worker.submit(job(4))


def test_errors_in_the_thread_are_answers():
    worker = ThreadWorker(lambda job: 1 / 0)
    worker.submit(job(0))
    (answer,) = collect(worker, 1)
    assert answer == Answer(job=answer.job, chunk=None, error="ZeroDivisionError: division by zero")
    worker.submit(job(1))  # and the thread goes on
    assert collect(worker, 1)[0].job.request.tick == 1
    worker.close()


def test_real_threads_and_a_real_clock_drive_a_robot():
    # Nothing is asserted about time: only that actions come, in order, and that the loop ends.
    worker = ThreadWorker(infer)
    robot = Robot()
    report = RobotLoop(replace(CONFIG, fps=500.0), worker).run(robot, ticks=200)
    worker.close()
    assert report["rate"]["ticks"] + report["rate"]["missed"] >= 200
    assert len(robot.sent) > 0
    assert [int(value) for value in robot.sent] == sorted(int(value) for value in robot.sent)
    assert report["last_error"] == ""
