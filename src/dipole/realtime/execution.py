"""Executing chunks while the next one is being computed: what to ask for, when, and what to do with a late answer.

`Controller` decides, one control tick after the other, and does nothing else: it holds no thread, socket or clock. The
robot's loop (`dipole.realtime.robot`) and the simulated closed loop (`dipole eval --latency-ms`) run the same one.

With a delay of d ticks between an observation and its chunk, the modes are:

    sync            ask when the plan is exhausted and stand still for d ticks; then execute Ta actions
    async-naive     ask every Ta ticks; when the chunk comes, begin at its first action, which was for d ticks ago
    async-drop      begin after the actions executed since: the first d are dropped
    async-blend     the same, crossfading from the old plan over some ticks
    async-weighted  the same, with LeRobot's fixed weights over the whole overlap
    async-ensemble  the same, with ACT's mean over all chunks that reached a tick
    async-append    the same, but the old plan is executed to its end
    rtc             async-drop, and the new chunk continues the actions that will have been executed by then
                    (real-time chunking, Black et al. 2025; the policy does it, see `dipole.realtime.chunking`)

The modes with overlap need chunks longer than Ta: the d actions after the Ta-th are executed while waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from dipole.errors import DipoleError, unknown
from dipole.realtime.delay import DelayTracker
from dipole.realtime.queue import ActionQueue, Merge
from dipole.realtime.watchdog import State, Watchdog

Fallback = Literal["last", "zero", "hold"]
Source = Literal["plan", "fallback", "none"]


@dataclass(frozen=True)
class Execution:
    """How chunks are executed.

    Attributes:
        overlap: Ask for the next chunk while this one is executed.
        align: Whether a late chunk begins after the actions executed since its observation, or at its first action.
        prefix: Tell the policy what will be executed in the meantime, so that its chunk continues that.
        merge: How a chunk meets the actions still planned.
        fallback: What to send when there is no action: the last one again, zeros, or what `hold` says.
        delay_window: Of how many delays the next is foretold.
        delay_quantile: Which of them: 1 for the largest.
    """

    overlap: bool = True
    align: bool = True
    prefix: bool = False
    merge: Merge = field(default_factory=Merge)
    fallback: Fallback = "last"
    delay_window: int = 10
    delay_quantile: float = 1.0

    def __post_init__(self) -> None:
        if self.fallback not in get_args(Fallback):
            raise unknown("fallback", self.fallback, get_args(Fallback))
        if self.delay_window < 1 or not 0 < self.delay_quantile <= 1:
            raise DipoleError("delay_window must be at least 1 and delay_quantile above 0 and at most 1")


MODES: dict[str, Execution] = {
    "sync": Execution(overlap=False, align=False),
    "async-naive": Execution(align=False),
    "async-drop": Execution(),
    "async-blend": Execution(merge=Merge("blend")),
    "async-weighted": Execution(merge=Merge("weighted")),
    "async-ensemble": Execution(merge=Merge("ensemble")),
    "async-append": Execution(merge=Merge("append")),
    "rtc": Execution(prefix=True),
}
"""The modes by name."""


def execution_mode(name: str) -> Execution:
    """Return a mode by name.

    Raises:
        DipoleError: There is no such mode.
    """
    if name not in MODES:
        raise unknown("execution mode", name, MODES)
    return MODES[name]


@dataclass(frozen=True)
class Request:
    """A chunk that is asked for.

    Attributes:
        id: Counts from 0 within an episode.
        tick: Tick of the observation it is for.
        planned: `[n, Da]`, the actions planned from that tick on (n = 0 without `prefix`).
        delay: In how many ticks the chunk is expected; these planned actions will have been executed by then.
        executed: How many planned actions had been executed (or passed over) before.
    """

    id: int
    tick: int
    planned: np.ndarray
    delay: int
    executed: int


@dataclass(frozen=True)
class Command:
    """What to do at a tick.

    Attributes:
        action: `[Da]`; None: send nothing, no chunk has come yet or the watchdog has given up.
        source: Where the action comes from.
        state: Of the watchdog.
    """

    action: np.ndarray | None
    source: Source
    state: State


@dataclass
class Counters:
    """What happened since the last reset.

    Attributes:
        ticks: Ticks with an action.
        fallback: Ticks among them without a planned action.
        requests: Chunks asked for.
        lost: Requests given up, as no answer came in time.
        late: Answers that were older than what had come in the meantime and were ignored.
        failed: Answers that were errors.
        stale: Actions that came too late to be executed.
    """

    ticks: int = 0
    fallback: int = 0
    requests: int = 0
    lost: int = 0
    late: int = 0
    failed: int = 0
    stale: int = 0


class Controller:
    """Executes chunks for one robot, tick by tick: `wants`, `ask`, `deliver` as answers come, then `act`.

    Args:
        execution: How.
        action_dim: Da.
        every: Ticks between requests (Ta); without overlap, how many actions of a chunk are executed.
        fps: Ticks per second.
        retry: Seconds after which an answer is taken for lost and asked for again.
        watchdog: Default: one that never trips.

    Attributes:
        queue: The plan.
        delay: The last delays, in ticks.
        counters: What happened since the last reset.
        last: The action of the last tick that had one, `[Da]`; whoever sends something else instead writes it here.
    """

    def __init__(
        self,
        execution: Execution,
        action_dim: int,
        every: int,
        fps: float,
        retry: float = 1.0,
        watchdog: Watchdog | None = None,
    ) -> None:
        if every < 1 or not fps > 0 or not retry > 0:
            raise ValueError(f"every {every} >= 1, fps {fps} > 0 and retry {retry} > 0 must hold")
        self.execution, self.action_dim, self.every, self.fps = execution, action_dim, every, fps
        self.retry_ticks = max(1, math.ceil(retry * fps - 1e-9))
        self.watchdog = Watchdog() if watchdog is None else watchdog
        self.queue = ActionQueue(execution.merge)
        self.delay = DelayTracker(execution.delay_window, execution.delay_quantile)
        self.reset()

    def reset(self) -> None:
        """Begin an episode: no plan, nothing asked for. The delays that were measured are kept."""
        self.queue.clear()
        self.watchdog.reset()
        self.counters = Counters()
        self._asked: Request | None = None  # the one whose answer is awaited
        self._last_asked = 0
        self._again = False  # the last answer was an error
        self._newest = -1  # tick of the observation of the newest chunk
        self.last: np.ndarray | None = None

    def wants(self, now: int) -> bool:
        """Return whether to ask for a chunk with the observation of tick `now`."""
        if self._asked is not None:
            if now - self._asked.tick < self.retry_ticks:
                return False
            self.counters.lost += 1
            self._asked = None
            return True
        if self._again or self.queue.remaining(now) == 0:
            return True
        return self.execution.overlap and now - self._last_asked >= self.every

    def ask(self, now: int) -> Request:
        """Return the request to send at tick `now`."""
        self.queue.advance(now)
        planned = self.queue.ahead(now) if self.execution.prefix else None
        if planned is None:
            planned = np.zeros((0, self.action_dim), dtype=np.float32)
        delay = math.ceil(self.delay.estimate)
        request = Request(self.counters.requests, now, planned.copy(), delay, self.queue.consumed)
        self.counters.requests += 1
        self._asked, self._last_asked, self._again = request, now, False
        return request

    def deliver(self, request: Request, chunk: np.ndarray, now: int) -> None:
        """Take an answer that came before the action of tick `now` was taken; `chunk` is `[n, Da]`."""
        self.delay.add(now - request.tick)
        if self._asked is not None and request.id == self._asked.id:
            self._asked = None
        if request.tick <= self._newest:
            self.counters.late += 1
            return
        self._newest = request.tick
        chunk = chunk if self.execution.overlap else chunk[: self.every]
        self.queue.advance(now)
        # Ticks without a planned action do not count: the robot stood still, and the chunk begins where it stands.
        executed = self.queue.consumed - request.executed if self.execution.align else 0
        self.counters.stale += self.queue.put(chunk, now - executed, now)
        self.watchdog.feed(request.tick / self.fps)

    def fail(self, request: Request) -> None:
        """Take an error for an answer: the next tick asks again."""
        self.counters.failed += 1
        if self._asked is not None and request.id == self._asked.id:
            self._asked, self._again = None, True

    def act(self, now: int, hold: Callable[[], np.ndarray] | None = None) -> Command:
        """Return what to do at tick `now`.

        Args:
            now: The tick; may skip numbers, whose actions are then forgotten.
            hold: Says which action keeps the robot where it is; needed for `fallback="hold"`.
        """
        state = self.watchdog.check(now / self.fps)
        if state in ("stale", "stopped"):
            self.queue.clear()  # what was planned on a view so old is not resumed
        action = self.queue.pop(now)
        source: Source = "plan"
        if action is None and state in ("running", "stale"):
            action, source = self._fall_back(hold), "fallback"
        if action is None:
            return Command(None, "none", state)
        self.counters.fallback += source == "fallback"
        self.counters.ticks += 1
        self.last = action
        return Command(action, source, state)

    def _fall_back(self, hold: Callable[[], np.ndarray] | None) -> np.ndarray | None:
        fallback = self.execution.fallback
        if fallback == "hold":
            if hold is None:
                raise DipoleError("fallback 'hold' needs to be told how the robot is held: pass hold, or use 'last'")
            return hold()
        return np.zeros(self.action_dim, dtype=np.float32) if fallback == "zero" else self.last
