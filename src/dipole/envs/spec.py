"""What an environment promises: its spec, the result of a step, and the protocols of one and of many environments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from dipole.data import Feature

Score = Literal["success", "max_reward", "return"]
Observation = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class EnvSpec:
    """Everything about an environment that does not change from episode to episode.

    Attributes:
        name: The name `make` knows it by, e.g. `metaworld/peg-insert-side-v3`.
        observation: Feature name (LeRobot's, `observation.*`) to feature; shapes without a batch dimension.
        action: The action feature, shape `(Da,)`.
        action_low: `[Da]` smallest action; smaller ones are clipped.
        action_high: `[Da]` largest action.
        max_steps: Number of env steps after which an episode is truncated.
        fps: Control frequency in Hz.
        task: One sentence that says what is to be done.
        score: How an episode is judged: `success` (1 if any step succeeded), `max_reward` (largest reward of a step)
            or `return` (undiscounted sum of rewards).
        tasks: Sentences of an environment that poses several tasks (info `task_index` says which); else empty.
    """

    name: str
    observation: dict[str, Feature]
    action: Feature
    action_low: np.ndarray
    action_high: np.ndarray
    max_steps: int
    fps: float
    task: str
    score: Score = "success"
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one step of `n` rows returned.

    Attributes:
        obs: Observation after the step, each `[n, *shape]`.
        reward: `[n]` float32.
        terminated: `[n]` bool: the task itself ended (success or failure). Values do not bootstrap through it.
        truncated: `[n]` bool: the time limit was reached. Values bootstrap through it.
        success: `[n]` bool: the goal holds at this step.
        info: `n` dicts with what else the environment reports.
    """

    obs: Observation
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    info: list[dict[str, Any]]

    @property
    def done(self) -> np.ndarray:
        """Return `[n]` bool: the episode is over, for whichever reason."""
        over: np.ndarray = np.logical_or(self.terminated, self.truncated)
        return over


@dataclass(frozen=True, eq=False)
class Transition:
    """What one step of a single environment returned; fields as in `StepResult`, without the row dimension."""

    obs: Observation
    reward: float
    terminated: bool
    success: bool
    info: dict[str, Any]


class SingleEnv(Protocol):
    """One environment, as an adapter offers it. Time limits and clipping are the vectoriser's business."""

    spec: EnvSpec

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names, whatever ran here before, and return its first observation."""

    def step(self, action: np.ndarray) -> Transition:
        """Apply `action` `[Da]`, already clipped to the spec's bounds."""

    def render(self) -> np.ndarray:
        """Return a picture, uint8 `[H, W, 3]`."""

    def close(self) -> None:
        """Free windows, contexts and memory. May be called twice."""


@runtime_checkable
class VectorEnv(Protocol):
    """Several environments of one kind, stepped together. There is no autoreset.

    An episode is determined by its seed alone: not by the row it runs in, by what ran there before, or by `num_envs`.
    """

    spec: EnvSpec
    num_envs: int

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Observation:
        """Start a new episode in each of `rows` and return their observations, each `[len(rows), *shape]`."""

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> StepResult:
        """Apply `actions` `[len(rows), Da]` in physical units to `rows`; bounds are enforced by clipping.

        Raises:
            ValueError: An action is not finite, or a row's episode is over and was not reset.
        """

    def render(self, row: int) -> np.ndarray:
        """Return a picture of one row, uint8 `[H, W, 3]`."""

    def close(self) -> None:
        """Free all resources. May be called twice."""


def check_rows(rows: Sequence[int], num_envs: int, count: int, what: str) -> list[int]:
    """Return `rows` as a list of ints, or raise ValueError when they do not fit `num_envs` or the `count` of `what`."""
    rows = [int(row) for row in rows]
    if len(rows) != count:
        raise ValueError(f"{len(rows)} rows but {count} {what}")
    if len(set(rows)) != len(rows) or any(not 0 <= row < num_envs for row in rows):
        raise ValueError(f"rows {rows} must be distinct and within 0..{num_envs - 1}")
    return rows


def clip_actions(spec: EnvSpec, actions: np.ndarray) -> np.ndarray:
    """Return `actions` `[n, Da]` as float32 within the spec's bounds; ValueError when the shape or a number is off."""
    actions = np.asarray(actions, dtype=np.float32)
    if actions.ndim != 2 or actions.shape[1:] != spec.action.shape:
        raise ValueError(f"actions have shape {actions.shape}, {spec.name} takes [n, {spec.action.shape[0]}]")
    if not np.isfinite(actions).all():
        raise ValueError(f"an action for {spec.name} is not finite")
    clipped: np.ndarray = np.clip(actions, spec.action_low, spec.action_high).astype(np.float32)
    return clipped
