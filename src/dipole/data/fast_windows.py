"""Windows for policies that feel between two plans: what fast sensors told at every tick of the chunk comes along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.windows import Windows

FAST_PREFIX = "fast."
"""The ticks of feature `observation.force` are given as `fast.observation.force`."""


class FastWindows:
    """`Windows` that also hold the fast features of every tick of the chunk, as `fast.<name>` `[B, T, F]`.

    Args:
        episodes: The data.
        obs_keys: Observed features.
        fast: Those seen at every tick.
        obs_horizon: To.
        pred_horizon: T.
        period: How far a window may stick out at the end of an episode, see `Windows`.
    """

    def __init__(
        self,
        episodes: Episodes,
        obs_keys: Sequence[str],
        fast: Sequence[str],
        obs_horizon: int = 4,
        pred_horizon: int = 32,
        period: int = 16,
    ) -> None:
        horizons = (obs_horizon, pred_horizon, period)
        self.episodes, self.fast = episodes, tuple(fast)
        self.windows = Windows(episodes, obs_keys, "action", *horizons)
        self._fast = {key: Windows(episodes, (), key, *horizons) for key in fast}

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows numbered `indices` `[B]`."""
        batch = self.windows.batch(indices)
        return batch | {FAST_PREFIX + key: windows.batch(indices)["action"] for key, windows in self._fast.items()}
