"""Windows of play data with goals taken from the future: what happened later is what was wanted (hindsight).

Source: Lynch et al., "Learning Latent Plans from Play" (2019); in the form of BESO (Reuss et al. 2023): the goal is a
run of consecutive observations, drawn uniformly from those after the window, in the same episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipole.data.episodes import Episodes
from dipole.errors import DipoleError

GOAL_PREFIX = "goal."
"""Goals of feature `observation.state` are given as `goal.observation.state`."""


class HindsightWindows:
    """Whole windows (no padding) of w observations and actions, each with g goal observations.

    Sample k is window k mod W with its (k div W)-th goal: a function of k and the seed alone, so that the order of
    training is the only thing random and a run can be resumed. There are `draws` goals per window.

    Args:
        episodes: The data.
        obs_keys: Columns given as observations, and as goals.
        window: w.
        goal_horizon: g.
        draws: Goals per window.
        seed: Of the goals.

    Raises:
        DipoleError: No episode is as long as a window.
    """

    def __init__(
        self,
        episodes: Episodes,
        obs_keys: Sequence[str],
        window: int = 4,
        goal_horizon: int = 2,
        draws: int = 64,
        seed: int = 0,
    ) -> None:
        if min(window, goal_horizon, draws) < 1:
            raise DipoleError(f"window={window}, goal_horizon={goal_horizon} and draws={draws} must all be at least 1")
        for key in obs_keys:
            episodes.feature(key)
        self.episodes, self.obs_keys = episodes, tuple(obs_keys)
        self.window, self.goal_horizon, self.draws, self.seed = window, goal_horizon, draws, seed
        count = np.maximum(episodes.lengths - window + 1, 0)
        if count.sum() == 0:
            raise DipoleError(f"no episode has {window} frames: shorten the window")
        inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self.first = np.repeat(episodes.starts, count) + inside
        self.ends = np.repeat(episodes.ends, count)

    def __len__(self) -> int:
        return len(self.first) * self.draws

    def goal_frames(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first goal frame of samples `indices` `[B]`, and whether there is none (the frame is then 0)."""
        window = np.asarray(indices) % len(self.first)
        after = self.first[window] + self.window
        choices = self.ends[window] - self.goal_horizon - after + 1
        missing = choices < 1
        frame = after + np.floor(_uniform(np.asarray(indices), self.seed) * choices).astype(np.int64)
        return np.where(missing, 0, frame), missing

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples numbered `indices`.

        Args:
            indices: int `[B]`, in 0..len-1.

        Returns:
            Each observation key `[B, w, *shape]`, `action` `[B, w, Da]`, `action_is_pad` bool `[B, w]` (all false),
            each observation key with `goal.` in front `[B, g, *shape]`, and `goal_is_missing` bool `[B]`: the window
            ends too near the end of its episode.
        """
        frames = self.first[np.asarray(indices) % len(self.first)][:, None] + np.arange(self.window)
        start, missing = self.goal_frames(indices)
        goals = start[:, None] + np.arange(self.goal_horizon) * ~missing[:, None]
        batch = {key: self.episodes.columns[key][frames] for key in self.obs_keys}
        batch |= {GOAL_PREFIX + key: self.episodes.columns[key][goals] for key in self.obs_keys}
        batch["action"] = self.episodes.columns["action"][frames]
        batch["action_is_pad"] = np.zeros(frames.shape, dtype=bool)
        batch["goal_is_missing"] = missing
        return batch


def _uniform(index: np.ndarray, seed: int) -> np.ndarray:
    """Return numbers in [0, 1) that are a fixed function of `index` and `seed` (Steele et al. 2014, SplitMix64)."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    start = np.uint64(((seed + 1) * golden) & mask)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = index.astype(np.uint64) * np.uint64(golden) + start
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
