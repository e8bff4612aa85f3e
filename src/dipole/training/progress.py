"""A progress bar on stderr, silent when nobody is looking."""

from __future__ import annotations

import sys
import time
from typing import Any

_REFRESH_SECONDS = 0.2


class ProgressBar:
    """Shows updates done, the last figures, and the time left.

    Args:
        total: Updates of the whole run.
        done: Updates already done.
        show: None shows it only when stderr is a terminal.
    """

    def __init__(self, total: int, done: int, show: bool | None = None) -> None:
        self._bar: Any = None
        self._next = 0.0
        if sys.stderr.isatty() if show is None else show:
            self._bar = _make_bar()
            self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Move the bar; most calls cost next to nothing."""
        if self._bar and time.monotonic() >= self._next:
            self._bar.update(self._task, completed=done)
            self._next = time.monotonic() + _REFRESH_SECONDS

    def show(self, done: int, **figures: float | None) -> None:
        """Move the bar and show these figures."""
        if self._bar:
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
            self._bar.update(self._task, completed=done, figures=text)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
