"""The scripted experts that come with Meta-World: one per task, a function of the observation alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from dipole.envs.spec import Observation, VectorEnv
from dipole.errors import MissingExtraError


def _policy(task: str) -> Any:
    try:
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError:
        raise MissingExtraError("metaworld", "envs") from None
    # Its experts aim beyond what a step can do and rely on the clipping; they warn of it at every step.
    warnings.filterwarnings("ignore", message="Constant.s. may be too high", module="metaworld")
    policies: dict[str, Any] = ENV_POLICY_MAP
    return policies[task]()


class MetaWorldExpert:
    """One scripted policy per row (some of them remember how far they are)."""

    def __init__(self, env: VectorEnv) -> None:
        self._task = env.spec.name.split("/")[1]
        self._policies = [_policy(self._task) for _ in range(env.num_envs)]

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; see `Expert.reset`."""
        for row in rows:
            self._policies[row] = _policy(self._task)

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the clean actions of `rows`, clipped to [-1, 1]; see `Expert.act`."""
        states = obs["observation.state"].astype(np.float64)
        actions = [self._policies[row].get_action(state) for row, state in zip(rows, states, strict=True)]
        clipped: np.ndarray = np.clip(np.stack(actions), -1, 1).astype(np.float32)
        return clipped
