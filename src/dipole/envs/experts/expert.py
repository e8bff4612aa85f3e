"""Scripted experts: what a demonstrator promises, and a runner for demonstrators written as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dipole.envs.spec import Observation

Memory = dict[str, np.ndarray]
# Mixed into the episode's seed, so that what the expert draws is independent of what the environment draws.
_EXPERT_STREAM = 1


def expert_rng(seed: int) -> np.random.Generator:
    """Return the expert's random generator for the episode of `seed`."""
    return np.random.default_rng([seed, _EXPERT_STREAM])


class Expert(Protocol):
    """A demonstrator for the rows of a `VectorEnv`. Its actions are determined by the seeds and what it observed."""

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; `obs` are their first observations, each `[len(rows), ...]`."""

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the clean action of each of `rows`, float32 `[len(rows), Da]`."""


class Demonstrator(Protocol):
    """A vectorised expert as pure functions of observation and memory, both dicts of arrays."""

    def plan(self, rng: np.random.Generator, obs: Observation) -> Memory:
        """Return the memory of one episode that starts at `obs` (one row, without a row dimension)."""

    def act(self, obs: Observation, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return actions `[n, Da]` and the memory afterwards; `memory["clock"]` `[n]` counts the calls before this."""


class RowExpert:
    """The `Expert` of a `Demonstrator`: keeps the memory of every row."""

    def __init__(self, demonstrator: Demonstrator, num_rows: int) -> None:
        self._demonstrator = demonstrator
        self._num_rows = num_rows
        self._memory: Memory = {}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; see `Expert.reset`."""
        for k, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            plan = self._demonstrator.plan(expert_rng(int(seed)), {key: value[k] for key, value in obs.items()})
            for key, value in (plan | {"clock": np.asarray(0)}).items():
                value = np.asarray(value)
                if key not in self._memory:
                    self._memory[key] = np.zeros((self._num_rows, *value.shape), value.dtype)
                self._memory[key][row] = value

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the clean actions of `rows`; see `Expert.act`."""
        rows = list(rows)
        actions, memory = self._demonstrator.act(obs, {key: value[rows] for key, value in self._memory.items()})
        for key, value in memory.items():
            self._memory[key][rows] = value
        self._memory["clock"][rows] += 1
        return actions.astype(np.float32)
