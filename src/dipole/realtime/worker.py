"""Where chunks are computed while the robot goes on: a thread, which may itself wait for a remote server.

A `Worker` takes one job at a time and gives its answer later; an error is an answer too. The robot's loop never waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dipole.realtime.clock import Clock
from dipole.realtime.execution import Request


@dataclass(frozen=True)
class Job:
    """A chunk to compute.

    Attributes:
        request: What was asked for.
        obs: The last To observations, each `[To, ...]`, oldest first.
        asked: When, in seconds of the loop's clock.
        episode: Counts the loop's episodes; a policy with a memory begins anew when it changes.
    """

    request: Request
    obs: Mapping[str, np.ndarray]
    asked: float
    episode: int


@dataclass(frozen=True)
class Answer:
    """What came of a job.

    Attributes:
        job: The job.
        chunk: `[n, Da]`; None after an error.
        error: What went wrong, in a line.
    """

    job: Job
    chunk: np.ndarray | None
    error: str = ""


Infer = Callable[[Job], np.ndarray]
"""Computes the chunk of a job: `dipole.realtime.local.LocalPolicy`, or a function that asks a server."""


class Worker(Protocol):
    """Computes chunks elsewhere."""

    def submit(self, job: Job) -> None:
        """Take a job and return at once. A job that was not begun yet is replaced by a newer one."""

    def poll(self) -> list[Answer]:
        """Return the answers that have come since the last call, in order; returns at once."""

    def close(self) -> None:
        """Take no further jobs. May be called twice."""


def solve(infer: Infer, job: Job) -> Answer:
    """Return the answer to a job; whatever goes wrong, and a chunk that is none, becomes an error."""
    try:
        chunk = np.asarray(infer(job))
    except Exception as error:  # the robot must go on, whatever a server or a driver raises
        return Answer(job, None, f"{type(error).__name__}: {error}")
    if chunk.ndim != 2 or len(chunk) == 0:
        return Answer(job, None, f"the chunk has shape {list(chunk.shape)}, expected [n, Da]")
    return Answer(job, chunk)


class ThreadWorker:
    """One thread that computes one chunk after the other.

    Args:
        infer: Computes a chunk.
    """

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._job: Job | None = None
        self._answers: deque[Answer] = deque()
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a call that never returns must not keep a stopped robot's program alive.
        self._thread = threading.Thread(target=self._work, name="dipole-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand over a job; one that still waits is replaced."""
        with self._changed:
            if self._closed:
                raise ValueError("the worker is closed")
            self._job = job
            self._changed.notify()

    def poll(self) -> list[Answer]:
        """Return the answers so far."""
        with self._changed:
            answers = list(self._answers)
            self._answers.clear()
        return answers

    def close(self, timeout: float = 1.0) -> None:
        """End the thread, waiting at most `timeout` seconds for a call under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._job is not None)
                if self._closed:
                    return
                job, self._job = self._job, None
            assert job is not None
            answer = solve(self._infer, job)
            with self._changed:
                self._answers.append(answer)


class SimulatedWorker:
    """A worker whose answers come when a simulated clock says so.

    Args:
        infer: Computes a chunk, at once.
        clock: The clock of the loop.
        delay: Called per job; seconds until its answer, None if it is lost.
    """

    def __init__(self, infer: Infer, clock: Clock, delay: Callable[[], float | None]) -> None:
        self._infer, self._clock, self._delay = infer, clock, delay
        self._due: list[tuple[float, Answer]] = []

    def submit(self, job: Job) -> None:
        """Compute the answer and keep it until its time has come."""
        delay = self._delay()
        if delay is not None:
            self._due.append((self._clock.now() + delay, solve(self._infer, job)))

    def poll(self) -> list[Answer]:
        """Return the answers whose time has come, the earliest first."""
        now = self._clock.now() + 1e-9  # a tick's time and a sum of delays may differ by rounding
        answers = [answer for due, answer in sorted(self._due, key=lambda item: item[0]) if due <= now]
        self._due = [item for item in self._due if item[0] > now]
        return answers

    def close(self) -> None:
        """Forget what is under way."""
        self._due.clear()
