"""The demonstrator of `contact/Wipe`: even speed along x, and a controller that moves the target by the force felt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dipole.envs.adapters.contact import STIFFNESS
from dipole.envs.micro.wipe import TARGET, TICKS
from dipole.envs.spec import Observation, VectorEnv

_PROPORTIONAL, _INTEGRAL = 0.5, 0.08
_LARGEST = 0.03  # m the target moves along z in a tick


class WipeExpert:
    """Moves the target where the force is off; an error far from the target is capped, as contact may be lost."""

    def __init__(self, env: VectorEnv) -> None:
        self._envs: Any = env.envs  # type: ignore[attr-defined]
        self._sums: dict[int, float] = {}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes with no accumulated error."""
        self._sums.update(dict.fromkeys(rows, 0.0))

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the targets (x, z)."""
        actions = []
        for row, force in zip(rows, obs["observation.force"][:, 0], strict=True):
            error = float(np.clip(force - TARGET, -1.0, 4.0))
            self._sums[row] = float(np.clip(self._sums[row] + error, -3, 3))
            dz = (_PROPORTIONAL * error + _INTEGRAL * self._sums[row]) / STIFFNESS
            x, z = self._envs[row].command
            actions.append((min(x + 1 / TICKS, 1.0), z + float(np.clip(dz, -_LARGEST, _LARGEST))))
        return np.array(actions, dtype=np.float32)
