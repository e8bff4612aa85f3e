"""The watchdog: what a robot does when no fresh chunk comes.

    waiting --chunk--> running --no fresh chunk for `timeout`--> stale --chunk--> running (a recovery)
                                                                 stale --`give_up` later--> stopped (latched)

Freshness is the age of the observation behind the newest chunk, not the time since its arrival: a chunk computed from
an old picture does not make the robot see. `stopped` is left by `reset` only, that is, by somebody who looked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["waiting", "running", "stale", "stopped"]


@dataclass
class WatchdogCounters:
    """What happened since the last reset.

    Attributes:
        trips: How often chunks became stale.
        recoveries: How often a fresh one came after that.
        stops: Whether it gave up (0 or 1).
        longest: Largest age of the newest observation acted on, in seconds.
    """

    trips: int = 0
    recoveries: int = 0
    stops: int = 0
    longest: float = 0.0


class Watchdog:
    """Watches the age of what is acted on; all times are seconds of one clock, handed in.

    Args:
        timeout: Age of the newest observation at which the robot falls back; None for never.
        give_up: Further seconds after which it stops for good; None for never.
    """

    def __init__(self, timeout: float | None = None, give_up: float | None = None) -> None:
        if (timeout is not None and timeout <= 0) or (give_up is not None and give_up < 0):
            raise ValueError("the watchdog's timeout must be positive and give_up not negative")
        self.timeout, self.give_up = timeout, give_up
        self.reset()

    def reset(self) -> None:
        """Start again: no chunk has come yet."""
        self.state: State = "waiting"
        self.counters = WatchdogCounters()
        self._observed = 0.0

    def feed(self, observed: float) -> None:
        """Note a chunk for an observation made at time `observed`; an older one than the newest changes nothing.

        A chunk that is too old already does not wake the robot: the next `check` finds it stale again.
        """
        if self.state == "stopped" or (self.state != "waiting" and observed <= self._observed):
            return
        self._observed = observed
        if self.state == "waiting":
            self.state = "running"

    def check(self, now: float) -> State:
        """Return the state at time `now`."""
        if self.state in ("waiting", "stopped"):
            return self.state
        age = now - self._observed
        self.counters.longest = max(self.counters.longest, age)
        if self.timeout is None:
            return self.state
        late = age >= self.timeout
        if self.state == "running" and late:
            self.state = "stale"
            self.counters.trips += 1
        elif self.state == "stale" and not late:
            self.state = "running"
            self.counters.recoveries += 1
        if self.state == "stale" and self.give_up is not None and age >= self.timeout + self.give_up:
            self.state = "stopped"
            self.counters.stops += 1
        return self.state
