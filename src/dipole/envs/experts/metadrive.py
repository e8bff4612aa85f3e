"""MetaDrive's own driver: the intelligent driver model with lane changes (Treiber et al. 2000), as an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dipole.envs.adapters.metadrive import SUBSTEPS, TICK
from dipole.envs.adapters.metadrive_view import to_ego
from dipole.envs.spec import Observation, VectorEnv

# `Plan`: full throttle and full brake in m/s^2, and the time in which an offset from the lane's middle decays, in s.
_ACCELERATION, _BRAKING, _SETTLING = 2.0, 5.0, 1.5
_TOP_SPEED = 30 / 3.6


def _make_driver(vehicle: Any, seed: int) -> Any:
    from metadrive.policy.idm_policy import IDMPolicy

    class Driver(IDMPolicy):  # type: ignore[misc]
        """Remembers the lane it steers to."""

        lane: Any = None

        def steering_control(self, target_lane: Any) -> float:
            self.lane = target_lane
            steering: float = super().steering_control(target_lane)
            return steering

    return Driver(vehicle, seed)


class IdmExpert:
    """Drives by steering and throttle, or plans where the driver will be in half a second."""

    def __init__(self, env: VectorEnv) -> None:
        self._envs: Any = env.envs  # type: ignore[attr-defined]
        self._drivers: dict[int, Any] = {}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes."""
        for row, seed in zip(rows, seeds, strict=True):
            self._drivers[row] = _make_driver(self._envs[row].vehicle, int(seed) % 2**31)

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the actions."""
        return np.stack([self._action(self._envs[row], self._drivers[row]) for row in rows]).astype(np.float32)

    def _action(self, env: Any, driver: Any) -> np.ndarray:
        command = np.clip(driver.act(), -1, 1)
        return _increment(env, driver.lane, float(command[1])) if env.plans else command


def _increment(env: Any, lane: Any, throttle: float) -> np.ndarray:
    """Return where a driver who keeps to `lane` is half a second later, relative to where it is now."""
    pose, speed, seconds = env.pose(), float(env.vehicle.speed), SUBSTEPS * TICK
    change = throttle * (_ACCELERATION if throttle > 0 else _BRAKING) * seconds
    way = seconds * (speed + np.clip(speed + change, 0, max(_TOP_SPEED, speed))) / 2
    along, across = lane.local_coordinates(pose[:2])
    along, across = along + way, across * np.exp(-seconds / _SETTLING)
    place = np.array(lane.position(along, across), dtype=np.float64)
    lean = np.arctan2(-across / _SETTLING, max(speed, 1.0))  # towards the middle of the lane
    turn = lane.heading_theta_at(along) + lean - pose[2]
    return np.array([*to_ego(place[None], pose)[0], np.arctan2(np.sin(turn), np.cos(turn))])
