"""A progress bar of episodes on stderr, silent when nobody is looking."""

from __future__ import annotations

import sys
from typing import Any

from dipole.evaluation.episode import Episode


class EpisodeBar:
    """Shows finished episodes and the share that succeeded; call it with each finished episode.

    Args:
        total: Number of episodes.
        label: What is evaluated.
        show: None shows it only when stderr is a terminal.
    """

    def __init__(self, total: int, label: str = "episodes", show: bool | None = None) -> None:
        self._bar: Any = None
        self._done = self._successes = 0
        if sys.stderr.isatty() if show is None else show:
            self._bar = _make_bar()
            self._task = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> EpisodeBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, episode: Episode) -> None:
        """Count an episode."""
        self._done += 1
        self._successes += episode.success
        if self._bar:
            rate = f"success {100 * self._successes / self._done:.0f} %"
            self._bar.update(self._task, completed=self._done, rate=rate)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
