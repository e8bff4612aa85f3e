"""Demonstrators of micro environments: pure functions of the true state and a memory, and the `Expert` they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dipole.envs.experts.expert import expert_rng
from dipole.envs.micro.task import NativeVector, State
from dipole.envs.spec import Observation

Memory = dict[str, np.ndarray]


class Demonstrator(Protocol):
    """A vectorised expert. It may look at the true state (but not at the noise to come, which is stored there too)."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Return the memory of an episode that starts in `state` (one row, without a row dimension)."""

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return actions `[n, Da]` and the memory afterwards; `state["clock"]` `[n]` counts the steps so far."""


class NativeExpert:
    """The `Expert` of a demonstrator: keeps the memory of every row of `env`."""

    def __init__(self, demonstrator: Demonstrator, env: NativeVector) -> None:
        self._demonstrator = demonstrator
        self._env = env
        self._memory: Memory = {}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; see `Expert.reset`."""
        for row, seed in zip(rows, seeds, strict=True):
            state = {key: value[0] for key, value in self._env.state([row]).items()}
            for key, value in self._demonstrator.plan(expert_rng(int(seed)), state).items():
                value = np.asarray(value)
                if key not in self._memory:
                    self._memory[key] = np.zeros((self._env.num_envs, *value.shape), value.dtype)
                self._memory[key][row] = value

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the clean actions of `rows`; see `Expert.act`."""
        rows = list(rows)
        memory = {key: value[rows] for key, value in self._memory.items()}
        actions, memory = self._demonstrator.act(self._env.state(rows), memory)
        for key, value in memory.items():
            self._memory[key][rows] = value
        return actions.astype(np.float32)
