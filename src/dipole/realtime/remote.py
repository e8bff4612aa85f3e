"""A policy on a server as what a `Worker` calls."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from dipole.realtime.worker import Job


class Client(Protocol):
    """What is needed of `dipole.serving.client.PolicyClient`."""

    def infer(self, observation: Any, *, reset: bool = False, executed: int | None = None) -> Any:
        """Return a reply with `actions` `[Ta, Da]`."""


class RemotePolicy:
    """Asks a policy server for the chunks of one robot; its session there begins anew with each episode.

    A request carries its To observations and how many actions of the chunk before had been executed, so that the server
    checks the rate of change from the right action. A server's chunks have Ta actions: with a delay of d ticks, ask for
    the next after Ta - d of them (`LoopConfig.every`), or serve the policy with a longer action horizon.

    Args:
        client: A `PolicyClient`, used by the worker's thread only.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._episode: int | None = None
        self._executed = 0

    def __call__(self, job: Job) -> np.ndarray:
        """Return the chunk `[Ta, Da]` of a job; raises what the client raises."""
        begins = job.episode != self._episode
        executed = 0 if begins else job.request.executed - self._executed
        reply = self.client.infer(dict(job.obs), reset=begins, executed=executed)
        self._episode, self._executed = job.episode, job.request.executed
        return np.asarray(reply.actions)
