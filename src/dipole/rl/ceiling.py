"""What a base could do if its luck were chosen: the success of the best of n attempts, with the true outcome known.

The ceiling of methods that only steer a base (DSRL): what it never does, they cannot make it do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.diffusion.tensors import Random
from dipole.envs.spec import VectorEnv
from dipole.evaluation.rollout import rollout
from dipole.policies.policy import Observation, State
from dipole.training.seeding import generator


class _Attempt:
    """A policy with a source of noise of its own, so that the same episode can be tried again."""

    def __init__(self, policy: Any, seed: int, attempt: int) -> None:
        self.policy, self.generator = policy, generator(seed, "attempt", attempt)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Act with this attempt's noise."""
        action: tuple[Tensor, State] = self.policy.act(obs, state, noise, self.generator)
        return action


def best_of_n(policy: Any, env: VectorEnv, seeds: Sequence[int], n: int, seed: int = 0) -> np.ndarray:
    """Return whether any of the first k attempts at each episode succeeded, for k = 1..n: bool `[n, E]`.

    Args:
        policy: A policy whose actions depend on noise.
        env: Environments.
        seeds: Episodes.
        n: Attempts at each.
        seed: Of the noise.
    """
    tries = []
    with torch.no_grad():
        for attempt in range(n):
            tries.append(rollout(_Attempt(policy, seed, attempt), env, seeds).column("success"))
    reached: np.ndarray = np.logical_or.accumulate(np.stack(tries), axis=0)
    return reached
