"""What RDP is judged by: the share of ticks in which the force is right, before and after the surface shifts."""

from __future__ import annotations

from typing import Any

import numpy as np

from dipole.envs import make
from dipole.evaluation.episode import Rollouts

FORCE = "observation.force"


def shares(rollouts: Rollouts, env_name: str) -> dict[str, float]:
    """Return the share of ticks with the right force, before and after the surface shifts.

    Args:
        rollouts: Episodes with their trajectories.
        env_name: The environment they were played in, which knows from an episode's seed when its surface shifts.
    """
    env = make(env_name, 1)
    before, after = [], []
    for episode in rollouts.episodes:
        env.reset([0], [episode.seed])
        tick = _shift_tick(env)
        assert episode.trajectory is not None
        low, high = band(env_name)
        force = episode.trajectory.observations[FORCE][1:, 0]
        fine = (force >= low) & (force <= high)
        clock = np.arange(1, len(fine) + 1)
        before.append(fine[clock < tick].mean())
        after.append(fine[clock >= tick].mean())
    env.close()
    return {"before": float(np.mean(before)), "after": float(np.mean(after))}


def _shift_tick(env: Any) -> int:
    return int(env.state([0])["tick"][0]) if hasattr(env, "state") else int(env.envs[0].shift_tick)


def band(env_name: str) -> tuple[float, float]:
    """Return the lowest and the highest force that is right in an environment."""
    if env_name == "micro/wipe":
        from dipole.envs.micro.wipe import BAND
    else:
        from dipole.envs.adapters.contact import BAND
    return BAND
