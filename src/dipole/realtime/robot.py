"""The loop beside the robot: observe, ask for chunks, send one action per control tick, whatever the network does.

Everything that can be slow happens in the worker; a tick only looks whether an answer has come. Between the plan and
the robot stand the watchdog (see `watchdog`) and the guard of outputs (`dipole.safety.OutputGuard`), which sees every
single action that is sent, those of the fallback included, with the one sent before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from dipole.errors import DipoleError
from dipole.realtime.clock import Clock, SystemClock
from dipole.realtime.delay import DelayTracker
from dipole.realtime.execution import MODES, Command, Controller, Execution
from dipole.realtime.rate import RateKeeper
from dipole.realtime.watchdog import Watchdog
from dipole.realtime.worker import Answer, Job, Worker


class Robot(Protocol):
    """What the loop needs of a robot. Both calls should take much less than a control period."""

    def observe(self) -> Mapping[str, np.ndarray]:
        """Return the newest observation by feature name, without batch or time dimension."""

    def send(self, action: np.ndarray) -> None:
        """Command the robot with an action `[Da]`."""


class Guard(Protocol):
    """What the loop needs of `dipole.safety.OutputGuard`."""

    @property
    def counts(self) -> dict[str, int]:
        """Return the violations so far, by rule."""

    def check(
        self,
        chunk: np.ndarray,
        previous: np.ndarray | None = None,
        obs: Mapping[str, Any] | None = None,
        past: Sequence[Any] | None = None,
    ) -> tuple[np.ndarray, list[Any]]:
        """Return what may be sent for `chunk` `[1, 1, Da]`, and what was wrong with it."""

    def remember(self, past: Any, actions: np.ndarray, obs: Mapping[str, Any] | None = None) -> Any:
        """Return the `past` of the next check."""

    def held(self, past: Any, action: np.ndarray, ticks: int, obs: Mapping[str, Any] | None = None) -> Any:
        """Return the `past` of the next check after missed ticks at which `action` `[Da]` was still in force."""


@dataclass(frozen=True)
class LoopConfig:
    """How a robot is driven.

    Attributes:
        fps: Control ticks per second; the rate of the demonstrations.
        action_dim: Da.
        every: Ticks between requests, Ta.
        obs_horizon: To; the last To observations, one per tick, go into a request.
        execution: See `dipole.realtime.execution`.
        timeout_ms: Age of the observation behind the newest chunk at which the robot falls back; None for never.
        give_up_ms: Further milliseconds after which it stops for good; None for never.
        retry_ms: After how long an answer is taken for lost.
    """

    fps: float
    action_dim: int
    every: int
    obs_horizon: int = 1
    execution: Execution = field(default_factory=lambda: MODES["async-drop"])
    timeout_ms: float | None = 1000.0
    give_up_ms: float | None = None
    retry_ms: float = 1000.0

    def __post_init__(self) -> None:
        if self.fps <= 0 or min(self.action_dim, self.every, self.obs_horizon) < 1 or self.retry_ms <= 0:
            raise DipoleError("fps and retry_ms must be positive, action_dim, every and obs_horizon at least 1")
        if self.timeout_ms is not None and self.timeout_ms <= 0:
            raise DipoleError("timeout_ms must be positive, or None for no watchdog")


class RobotLoop:
    """Drives one robot.

    Args:
        config: How.
        worker: Computes chunks; closed by whoever made it.
        guard: Checks every action before it is sent; None for no checks but that numbers are finite.
        hold: Says which action keeps the robot where it is, for the fallback `hold`.
        clock: Where time comes from.

    Attributes:
        controller: Plan, watchdog and counters.
        rate: Deadlines and jitter.
        delay_ms: From observation to chunk, in milliseconds.
        last_error: The newest error of the worker, in a line.
    """

    def __init__(
        self,
        config: LoopConfig,
        worker: Worker,
        guard: Guard | None = None,
        hold: Callable[[], np.ndarray] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if config.execution.fallback == "hold" and hold is None:
            raise DipoleError("fallback 'hold' needs hold, a function that says how the robot is held")
        self.config, self.worker, self.guard, self.hold = config, worker, guard, hold
        self.clock = SystemClock() if clock is None else clock
        give_up = None if config.give_up_ms is None else config.give_up_ms / 1000
        watchdog = Watchdog(None if config.timeout_ms is None else config.timeout_ms / 1000, give_up)
        self.controller = Controller(
            config.execution, config.action_dim, config.every, config.fps, config.retry_ms / 1000, watchdog
        )
        self.rate = RateKeeper(config.fps, self.clock)
        self.delay_ms = DelayTracker(window=1000)
        self.last_error = ""
        self._episode = -1
        self.reset()

    def reset(self) -> None:
        """Begin an episode; answers to questions of the last one will be ignored."""
        self._episode += 1
        self.controller.reset()
        self.rate.reset()
        self._history: deque[Mapping[str, np.ndarray]] = deque(maxlen=self.config.obs_horizon)
        self._sent: np.ndarray | None = None
        self._past: Any = None  # what the guard's monitor is told of the ticks before
        self._before: tuple[int, Mapping[str, np.ndarray]] | None = None  # the last tick, and what was observed then

    def step(self, obs: Mapping[str, np.ndarray], tick: int) -> Command:
        """Return what to do at a tick; never waits for the worker.

        Args:
            obs: The newest observation.
            tick: Number of the tick; larger than in the last call.
        """
        for answer in self.worker.poll():
            self._take(answer, tick)
        self._fill(tick)
        self._history.append({key: np.array(value) for key, value in obs.items()})
        self._before = tick, self._history[-1]
        if self.controller.watchdog.state != "stopped" and self.controller.wants(tick):
            self._ask(tick)
            for answer in self.worker.poll():  # a worker without delay has answered already
                self._take(answer, tick)
        command = self.controller.act(tick, self.hold)
        if command.action is None:
            self._past = None
            return command
        action = self._guarded(command.action, obs)
        if action is not None:
            self._sent = action
        self.controller.last = self._sent  # the fallback repeats what was sent, not what was wanted
        if action is None:
            return Command(None, "none", command.state)
        return Command(action, command.source, command.state)

    def run(self, robot: Robot, ticks: int | None = None, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Drive the robot at the control rate until told to stop or the watchdog gives up; return `report()`.

        Args:
            robot: The robot.
            ticks: Begins no tick after this many; None for no end.
            stop: Asked at every tick.
        """
        while (ticks is None or self.rate.next_tick < ticks) and not (stop is not None and stop()):
            tick = self.rate.wait()
            command = self.step(robot.observe(), tick)
            if command.action is not None:
                robot.send(command.action)
            if command.state == "stopped":
                break
        return self.report()

    def report(self) -> dict[str, Any]:
        """Return JSON-able figures of this episode: rate, delays, counters, watchdog, violations."""
        return {
            "rate": asdict(self.rate.report()),
            "delay_ms": asdict(self.delay_ms.figures()),
            "execution": asdict(self.controller.counters),
            "watchdog": {"state": self.controller.watchdog.state, **asdict(self.controller.watchdog.counters)},
            "violations": {} if self.guard is None else self.guard.counts,
            "last_error": self.last_error,
        }

    def _ask(self, tick: int) -> None:
        frames = list(self._history)
        frames = [frames[0]] * (self.config.obs_horizon - len(frames)) + frames  # the first one repeated at the start
        obs = {key: np.stack([frame[key] for frame in frames]) for key in frames[-1]}
        self.worker.submit(Job(self.controller.ask(tick), obs, self.clock.now(), self._episode))

    def _take(self, answer: Answer, tick: int) -> None:
        job, chunk = answer.job, answer.chunk
        if job.episode != self._episode:
            return
        if chunk is None:
            self._fail(answer, answer.error)
        elif chunk.shape[1] != self.config.action_dim:
            self._fail(answer, f"the chunk has {chunk.shape[1]} action dimensions, not {self.config.action_dim}")
        elif not np.isfinite(chunk).all():
            self._fail(answer, "the chunk holds numbers that are not finite")
        else:
            self.delay_ms.add(1000 * max(0.0, self.clock.now() - job.asked))
            self.controller.deliver(job.request, chunk, tick)

    def _fail(self, answer: Answer, error: str) -> None:
        self.last_error = error
        self.controller.fail(answer.job.request)

    def _fill(self, tick: int) -> None:
        """Tell the guard what the robot did at the ticks missed since the last one: it went on with what it was sent.

        A monitor counts time in ticks: without these, its windows would last longer than its rules say.
        """
        if self.guard is None or self._past is None or self._sent is None or self._before is None:
            return
        last, seen = self._before
        if tick > last + 1:
            self._past = self.guard.held(self._past, self._sent, tick - last - 1, _framed(seen))

    def _guarded(self, action: np.ndarray, obs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return what may be sent; None where the guard refuses and knows nothing better.

        A tick at which nothing is sent has no action that a monitor could know: its trace begins anew.
        """
        if self.guard is None:
            return action
        previous = None if self._sent is None else self._sent[None]
        frame = _framed(obs)
        rows = {key: value[None] for key, value in frame.items()}
        try:
            safe, _ = self.guard.check(action[None, None], previous, rows, [self._past])
        except DipoleError as error:  # refused, with nothing to send instead
            self.last_error, self._past = str(error), None
            return None
        checked: np.ndarray = safe[0, 0]
        self._past = self.guard.remember(self._past, safe[0], frame)
        return checked


def _framed(obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an observation as a history of one frame, `[1, ...]` each."""
    return {key: np.asarray(value)[None] for key, value in obs.items()}
