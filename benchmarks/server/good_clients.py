"""Good clients: they ask all the time, know what the next reply of the stand-in policy must hold, and count.

A client's own observation and its session's count must come back (see `stand_in.py`). A count that skips is a state
touched by another; one that begins anew must have been announced (`restarted`).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from common import STATE

from dipole.errors import DipoleError
from dipole.serving.client import PolicyClient, ServerError


class Caller(threading.Thread):
    """A good client that asks all the time and checks every reply."""

    def __init__(self, url: str, name: int, observation: Callable[[int, int], dict[str, Any]] | None = None) -> None:
        super().__init__(daemon=True)
        self.client = PolicyClient(url, give_up_s=150, timeout_s=5)
        self.number, self.ended = name, threading.Event()
        self.answered = self.wrong = self.restarts = self.refused = self.unreachable = 0
        self.acknowledged: set[str] = set()
        self.checkpoints: list[str] = []
        self.observation = observation

    def run(self) -> None:
        """Ask until told to end."""
        count = k = 0
        while not self.ended.is_set():
            k += 1
            obs = (
                {STATE: np.array([self.number, k], np.float32)}
                if self.observation is None
                else self.observation(self.number, k)
            )
            try:
                reply = self.client.infer(obs)
            except ServerError:
                self.refused += 1
                continue
            except DipoleError:  # not reached in time, though the client went on trying for a long time
                self.unreachable += 1
                continue
            self.answered += 1
            self.restarts += reply.restarted
            count = 1 if reply.restarted else count + 1
            if self.observation is None:
                self.wrong += reply.actions[0].tolist() != [self.number, k, count]
            self.acknowledged.add(hashlib.sha256(reply.actions.tobytes()).hexdigest()[:16])
            self.checkpoints.append(reply.message["dipole/checkpoint"])
            time.sleep(0.002)


@contextlib.contextmanager
def callers(url: str, number: int = 8, **options: Any) -> Iterator[list[Caller]]:
    """Run good clients."""
    found = [Caller(url, name, **options) for name in range(number)]
    for caller in found:
        caller.start()
    try:
        deadline = time.monotonic() + 30
        while min(caller.answered for caller in found) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield found
        before = [caller.answered for caller in found]
        deadline = time.monotonic() + 30
        while min(c.answered - b for c, b in zip(found, before, strict=True)) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)  # all of them must be answered after the fault as well
    finally:
        for caller in found:
            caller.ended.set()
        for caller in found:
            caller.join(60)
            caller.client.close()


def summary(found: list[Caller], **more: Any) -> dict[str, Any]:
    """Return what the good clients saw."""
    total = {
        name: sum(getattr(caller, name) for caller in found)
        for name in ("answered", "wrong", "restarts", "refused", "unreachable")
    }
    return {**total, **more}
