"""Counters, gauges and histograms in Prometheus' text format. Written and read by the event loop only: no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_MAX_LABELS = 256


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(names: Sequence[str], values: Sequence[str], extra: str = "") -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)]
    inner = ",".join([*pairs, *([extra] if extra else [])])
    return f"{{{inner}}}" if inner else ""


class Counter:
    """A number that only grows, by labels."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help_text, self.labels = name, help_text, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Add to the number of these label values."""
        if labels in self.values or len(self.values) < _MAX_LABELS:
            self.values[labels] = self.values.get(labels, 0.0) + by

    def lines(self) -> list[str]:
        """Return the lines of the exposition."""
        return [f"{self.name}{_labels(self.labels, key)} {value:g}" for key, value in self.values.items()]


class Gauge:
    """A number read when asked for, by label values."""

    kind = "gauge"

    def __init__(
        self, name: str, help_text: str, read: Callable[[], dict[tuple[str, ...], float]], labels: Sequence[str] = ()
    ) -> None:
        self.name, self.help_text, self.read, self.labels = name, help_text, read, tuple(labels)

    def lines(self) -> list[str]:
        """Return the lines of the exposition."""
        return [f"{self.name}{_labels(self.labels, key)} {value:g}" for key, value in self.read().items()]


class Histogram:
    """Counts in buckets, by labels."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, edges: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help_text, self.labels = name, help_text, tuple(labels)
        self.edges = tuple(edges)
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count a value."""
        if labels not in self._counts and len(self._counts) >= _MAX_LABELS:
            return
        counts = self._counts.setdefault(labels, [0] * (len(self.edges) + 1))
        counts[bisect_left(self.edges, value)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + value

    def count(self, *labels: str) -> int:
        """Return how many values were counted."""
        return sum(self._counts.get(labels, ()))

    def lines(self) -> list[str]:
        """Return the lines of the exposition; buckets are cumulative."""
        lines = []
        for key, counts in self._counts.items():
            total = 0
            for edge, count in zip([f"{edge:g}" for edge in self.edges] + ["+Inf"], counts, strict=True):
                total += count
                le = f'le="{edge}"'
                lines.append(f"{self.name}_bucket{_labels(self.labels, key, le)} {total}")
            lines.append(f"{self.name}_sum{_labels(self.labels, key)} {self._sums[key]:.9g}")
            lines.append(f"{self.name}_count{_labels(self.labels, key)} {total}")
        return lines


def exposition(metrics: Sequence[Counter | Gauge | Histogram]) -> str:
    """Return the text of `/metrics`."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help_text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"
