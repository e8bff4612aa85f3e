"""Time as an input: the loop that drives a robot asks a clock, so that tests can hand it a simulated one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now(self) -> float:
        """Return seconds since an arbitrary moment; never goes backwards."""

    def sleep_until(self, deadline: float) -> None:
        """Return at `deadline` (seconds of this clock) or a little later; at once if it has passed."""


class SystemClock:
    """The machine's monotonic clock; changes of the wall-clock time do not touch it."""

    def now(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def sleep_until(self, deadline: float) -> None:
        """Sleep until `deadline`."""
        remaining = deadline - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)


class SimulatedClock:
    """A clock that stands still until it is told to move.

    Args:
        start: Its first time in seconds.
        oversleep: Called for every sleep; how many seconds later than asked the sleeper wakes.
    """

    def __init__(self, start: float = 0.0, oversleep: Callable[[], float] | None = None) -> None:
        self._now = start
        self._oversleep = oversleep or (lambda: 0.0)

    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass, as work would."""
        if seconds < 0:
            raise ValueError(f"time does not go backwards: {seconds}")
        self._now += seconds

    def sleep_until(self, deadline: float) -> None:
        """Let time pass until `deadline`, and as much longer as `oversleep` says."""
        if deadline > self._now:
            self._now = deadline + self._oversleep()
