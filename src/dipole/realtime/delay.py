"""How late answers come: the last few delays, and the one to reckon with for the next.

Real-time chunking (Black et al., "Real-Time Execution of Action Chunking Flow Policies", 2025, Algorithm 1) freezes as
many actions as the inference is expected to take, the largest of the last delays: an answer later than expected is
the costly case. A quantile below 1 forgives outliers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Figures:
    """A distribution in four numbers, in the unit of what was added.

    Attributes:
        count: How many values were ever added.
        p50: Median of those in the window.
        p99: 99th percentile of those in the window.
        max: Largest ever.
    """

    count: int
    p50: float
    p99: float
    max: float


class DelayTracker:
    """A sliding window of delays.

    Args:
        window: How many of the last delays count.
        quantile: Which of them is the estimate: 1 for the largest (the smallest value not exceeded by this fraction).
        first: The estimate before anything was measured.
    """

    def __init__(self, window: int = 10, quantile: float = 1.0, first: float = 0.0) -> None:
        if window < 1 or not 0 < quantile <= 1 or first < 0:
            raise ValueError(f"window {window} >= 1, 0 < quantile {quantile} <= 1 and first {first} >= 0 must hold")
        self.quantile, self.first = quantile, first
        self._values: deque[float] = deque(maxlen=window)
        self._count, self._max = 0, 0.0

    def add(self, delay: float) -> None:
        """Note a delay (>= 0)."""
        if not (math.isfinite(delay) and delay >= 0):
            raise ValueError(f"a delay must be finite and not negative, got {delay}")
        self._values.append(delay)
        self._count += 1
        self._max = max(self._max, delay)

    @property
    def estimate(self) -> float:
        """Return the delay to reckon with: a value that was measured, or `first`."""
        if not self._values:
            return self.first
        ordered = sorted(self._values)
        return ordered[math.ceil(self.quantile * len(ordered) - 1e-9) - 1]

    def figures(self) -> Figures:
        """Return the distribution; zeros before anything was added."""
        return figures(self._values, self._count, self._max)


def figures(values: Iterable[float], count: int, largest: float) -> Figures:
    """Return the figures of a window of values, of `count` ever seen with maximum `largest`."""
    window = np.fromiter(values, dtype=np.float64)
    if not len(window):
        return Figures(0, 0.0, 0.0, 0.0)
    p50, p99 = np.percentile(window, [50, 99])
    return Figures(count, float(p50), float(p99), largest)
