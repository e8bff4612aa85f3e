"""Micro environments: small tasks in numpy, vectorised over rows, each written as pure functions of a state.

A task draws everything random of an episode (start, goals, all process noise) when the episode starts, from its seed
alone. A step is then a deterministic function of state and action, the same whichever rows a row is stepped with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from dipole.data import Feature
from dipole.envs.spec import EnvSpec, Observation, Score, StepResult, check_rows, clip_actions

State = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step did to `n` rows: their next state; reward, terminated and success `[n]`; info, `[n, ...]` per key."""

    state: State
    reward: np.ndarray
    terminated: np.ndarray
    success: np.ndarray
    info: dict[str, np.ndarray]


class MicroTask(Protocol):
    """One micro environment. States are dicts of arrays: `[...]` for a row, `[n, ...]` for several."""

    spec: EnvSpec

    def begin(self, rng: np.random.Generator) -> State:
        """Return the first state of one episode, with all its future noise. `state["clock"]` is added by the runner."""

    def observe(self, state: State) -> Observation:
        """Return the observation of `n` rows; only of their state, never of noise to come."""

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Apply `action` `[n, Da]`. `state["clock"]` `[n]` counts the steps taken before this one."""

    def draw(self, state: State) -> np.ndarray:
        """Return a picture of one row, uint8 `[H, W, 3]`."""


def micro_spec(
    name: str,
    observation: Mapping[str, tuple[str, ...]],
    action: tuple[str, ...],
    bound: float | Sequence[float],
    max_steps: int,
    task: str,
    fps: float = 10.0,
    score: Score = "success",
) -> EnvSpec:
    """Return a spec of float32 vectors, given component names per observation and the symmetric bound of the action."""
    high = np.broadcast_to(np.asarray(bound, dtype=np.float32), (len(action),)).copy()
    features = {key: Feature("float32", (len(parts),), parts) for key, parts in observation.items()}
    return EnvSpec(name, features, Feature("float32", (len(action),), action), -high, high, max_steps, fps, task, score)


class NativeVector:
    """The `VectorEnv` of a micro task: all rows in one set of arrays."""

    def __init__(self, task: MicroTask, num_envs: int, max_steps: int | None = None) -> None:
        self._task = task
        self.num_envs = num_envs
        self.spec = task.spec if max_steps is None else replace(task.spec, max_steps=max_steps)
        blank = self._begin(0)
        self._state = {key: np.zeros((num_envs, *value.shape), value.dtype) for key, value in blank.items()}
        self._running = np.zeros(num_envs, dtype=bool)

    def _begin(self, seed: int) -> State:
        state = self._task.begin(np.random.default_rng(seed))
        return {key: np.asarray(value) for key, value in state.items()} | {"clock": np.asarray(0)}

    def state(self, rows: Sequence[int]) -> State:
        """Return a copy of the true state of `rows`, each `[len(rows), ...]`."""
        return {key: value[list(rows)] for key, value in self._state.items()}

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Observation:
        """Start the episodes that `seeds` name; see `VectorEnv.reset`."""
        rows = check_rows(rows, self.num_envs, len(seeds), "seeds")
        for row, seed in zip(rows, seeds, strict=True):
            for key, value in self._begin(int(seed)).items():
                self._state[key][row] = value
        self._running[rows] = True
        return self._task.observe(self.state(rows))

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> StepResult:
        """Step `rows`; see `VectorEnv.step`."""
        actions = clip_actions(self.spec, actions)
        rows = check_rows(rows, self.num_envs, len(actions), "actions")
        if not self._running[rows].all():
            raise ValueError(f"rows {[row for row in rows if not self._running[row]]} must be reset before a step")
        outcome = self._task.step(self.state(rows), actions.astype(np.float64))
        state = outcome.state | {"clock": outcome.state["clock"] + 1}
        for key, value in state.items():
            self._state[key][rows] = value
        self._running[rows] = ~outcome.terminated & (state["clock"] < self.spec.max_steps)
        return StepResult(
            obs=self._task.observe(state),
            reward=outcome.reward.astype(np.float32),
            terminated=outcome.terminated,
            truncated=~outcome.terminated & (state["clock"] >= self.spec.max_steps),
            success=outcome.success,
            info=_rows_of(outcome.info, len(rows)),
        )

    def render(self, row: int) -> np.ndarray:
        """Return a picture of one row, uint8 `[H, W, 3]`."""
        return self._task.draw({key: value[row] for key, value in self._state.items()})

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _rows_of(info: dict[str, np.ndarray], count: int) -> list[dict[str, Any]]:
    return [{key: value[row] for key, value in info.items()} for row in range(count)]
