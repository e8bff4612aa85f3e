"""A policy on the robot's own machine as what a `Worker` calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dipole.policies.policy import Policy, State
from dipole.realtime.worker import Job


class LocalPolicy:
    """Computes the chunks of one robot, one after the other; its memory begins anew with each episode.

    Args:
        policy: The policy; in mode `rtc` a `PrefixPolicy`, which is told what is planned.
        seed: Of the policy's noise; an episode's noise depends on it and on the episode's number.
        device: Where the policy computes.
    """

    def __init__(self, policy: Policy, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.policy, self.seed, self.device = policy, seed, torch.device(device)
        self._episode: int | None = None
        self._state: State = {}
        self._generator = torch.Generator(self.device)

    def __call__(self, job: Job) -> np.ndarray:
        """Return the chunk `[n, Da]` of a job."""
        if job.episode != self._episode:
            self._episode, self._state = job.episode, self.policy.initial_state(1)
            mixed = np.random.SeedSequence([self.seed, job.episode]).generate_state(1, np.uint64)
            self._generator.manual_seed(int(mixed[0]))
        told: Any = getattr(self.policy, "told", None)
        if told is not None:
            self._state = told([job.request])
        obs = {key: torch.as_tensor(np.array(value))[None].to(self.device) for key, value in job.obs.items()}
        with torch.no_grad():
            chunk, self._state = self.policy.act(obs, self._state, generator=[self._generator])
        actions: np.ndarray = chunk[0].cpu().numpy()
        return actions
