"""What a scripted expert promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dipole.envs.spec import Observation

# Mixed into the episode's seed, so that what the expert draws is independent of what the environment draws.
_EXPERT_STREAM = 1


def expert_rng(seed: int) -> np.random.Generator:
    """Return the expert's random generator for the episode of `seed`."""
    return np.random.default_rng([seed, _EXPERT_STREAM])


@dataclass(frozen=True)
class Collecting:
    """How demonstrations of an environment are collected unless the caller says otherwise.

    Attributes:
        success_only: Leave out episodes without success.
        steps_after_success: Frames recorded after the first success, where the environment goes on; None: all.
        options: Options of the environment while an expert demonstrates.
    """

    success_only: bool = True
    steps_after_success: int | None = 5
    options: dict[str, Any] = field(default_factory=dict)


class Expert(Protocol):
    """A demonstrator for the rows of a `VectorEnv`. Its actions are determined by the seeds and what it observed."""

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; `obs` are their first observations, each `[len(rows), ...]`."""

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the clean action of each of `rows`, float32 `[len(rows), Da]`."""
