"""Keeping a control rate: absolute deadlines, so that lateness of one tick is not carried into the next.

Tick k is due at `start + k / fps`. A tick that cannot begin within its own period is missed: it is skipped and counted,
never caught up with a burst of commands. Jitter is how much later than its deadline a tick begins.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from dipole.realtime.clock import Clock, SystemClock
from dipole.realtime.delay import Figures, figures

WINDOW = 10_000  # ticks of which the percentiles are taken: bounded memory for a robot that runs for weeks


@dataclass(frozen=True)
class RateReport:
    """How well the rate was kept.

    Attributes:
        ticks: Ticks that were begun.
        missed: Ticks that were skipped.
        jitter_ms: Lateness of the ticks begun, in milliseconds.
    """

    ticks: int
    missed: int
    jitter_ms: Figures


class RateKeeper:
    """Wakes its caller once per control period.

    Args:
        fps: Ticks per second.
        clock: Where time comes from.

    Attributes:
        missed: Ticks that were skipped.
        next_tick: Number of the tick that comes next, if it is not missed.
    """

    def __init__(self, fps: float, clock: Clock | None = None) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be positive, got {fps}")
        self.period = 1.0 / fps
        self.fps = fps
        self.clock = SystemClock() if clock is None else clock
        self.reset()

    def reset(self) -> None:
        """Begin again: the next `wait` returns tick 0 at once."""
        self.missed, self.next_tick, self._begun, self._max = 0, 0, 0, 0.0
        self._start: float | None = None
        self._jitter: deque[float] = deque(maxlen=WINDOW)

    def wait(self) -> int:
        """Sleep until the next tick is due and return its number; numbers that were missed are left out."""
        if self._start is None:
            self._start = self.clock.now()
        self.clock.sleep_until(self._start + self.next_tick / self.fps)
        elapsed = self.clock.now() - self._start
        # The tick whose period it is now; the small number keeps rounding from calling the punctual late or early.
        tick = max(self.next_tick, math.floor(elapsed * self.fps + 1e-6))
        self.missed += tick - self.next_tick
        late = max(0.0, elapsed - tick / self.fps)
        self._jitter.append(1000 * late)
        self._max = max(self._max, 1000 * late)
        self._begun += 1
        self.next_tick = tick + 1
        return tick

    def report(self) -> RateReport:
        """Return how well the rate was kept so far."""
        return RateReport(self._begun, self.missed, figures(self._jitter, self._begun, self._max))
