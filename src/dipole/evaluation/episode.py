"""Records of finished episodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Trajectory:
    """What happened in an episode of L environment steps.

    Attributes:
        observations: Each `[L + 1, ...]`, from the first to the one after the last action.
        actions: `[L, Da]`, as executed (clipped).
        rewards: `[L]`.
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class Episode:
    """One finished episode.

    Attributes:
        index: Its place in the list of seeds.
        seed: Its seed.
        success: Whether any of its steps was a success.
        return_: Sum of rewards.
        max_reward: Largest reward.
        length: Environment steps.
        terminated: The environment ended it.
        truncated: A time limit ended it.
        chunks: How often the policy was asked.
        trajectory: If it was to be kept.
        frames: uint8 `[L + 1, H, W, 3]` if it was filmed.
        execution: How chunks were executed, where that is simulated; else empty.
    """

    index: int
    seed: int
    success: bool
    return_: float
    max_reward: float
    length: int
    terminated: bool
    truncated: bool
    chunks: int
    trajectory: Trajectory | None = None
    frames: np.ndarray | None = None
    execution: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollouts:
    """Finished episodes in the order of their seeds.

    Attributes:
        episodes: One per seed.
        wall_s: Wall-clock seconds in all.
        notes: What could not be done, in words.
    """

    episodes: tuple[Episode, ...]
    wall_s: float
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> np.ndarray:
        """Return one attribute of all episodes, `[E]`."""
        return np.array([getattr(episode, name) for episode in self.episodes])
