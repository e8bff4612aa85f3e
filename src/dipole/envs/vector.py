"""Several single environments behind the `VectorEnv` protocol, stepped one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from dipole.envs.spec import EnvSpec, Observation, SingleEnv, StepResult, Transition, check_rows, clip_actions


def stack_observations(observations: Sequence[Observation]) -> Observation:
    """Return observations of single environments stacked key by key: each `[n, *shape]`."""
    return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}


class SyncVector:
    """Rows of single environments, one after the other.

    Args:
        builders: One function per row that builds its environment.
        max_steps: Time limit in env steps in place of the environment's own.

    Attributes:
        envs: The single environments, row by row.
    """

    def __init__(self, builders: Sequence[Callable[[], SingleEnv]], max_steps: int | None = None) -> None:
        if not builders:
            raise ValueError("a vector of environments needs at least one")
        self.envs = [build() for build in builders]
        self.num_envs = len(self.envs)
        spec = self.envs[0].spec
        self.spec: EnvSpec = spec if max_steps is None else replace(spec, max_steps=max_steps)
        self._clock = np.zeros(self.num_envs, dtype=np.int64)
        self._running = np.zeros(self.num_envs, dtype=bool)

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Observation:
        """Start the episodes that `seeds` name; see `VectorEnv.reset`."""
        rows = check_rows(rows, self.num_envs, len(seeds), "seeds")
        self._clock[rows], self._running[rows] = 0, True
        return stack_observations([self.envs[row].reset(int(seed)) for row, seed in zip(rows, seeds, strict=True)])

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> StepResult:
        """Step `rows`; see `VectorEnv.step`."""
        actions = clip_actions(self.spec, actions)
        rows = check_rows(rows, self.num_envs, len(actions), "actions")
        if not self._running[rows].all():
            raise ValueError(f"rows {[row for row in rows if not self._running[row]]} must be reset before a step")
        transitions = [self.envs[row].step(action) for row, action in zip(rows, actions, strict=True)]
        self._clock[rows] += 1
        result = self._collate(transitions, rows)
        self._running[rows] = ~result.done
        return result

    def _collate(self, transitions: list[Transition], rows: list[int]) -> StepResult:
        terminated = np.array([t.terminated for t in transitions], dtype=bool)
        return StepResult(
            obs=stack_observations([t.obs for t in transitions]),
            reward=np.array([t.reward for t in transitions], dtype=np.float32),
            terminated=terminated,
            truncated=~terminated & (self._clock[rows] >= self.spec.max_steps),
            success=np.array([t.success for t in transitions], dtype=bool),
            info=[t.info for t in transitions],
        )

    def render(self, row: int) -> np.ndarray:
        """Return a picture of one row, uint8 `[H, W, 3]`."""
        return self.envs[row].render()

    def close(self) -> None:
        """Close every environment. May be called twice."""
        while self.envs:
            self.envs.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
