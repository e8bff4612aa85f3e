"""Scripted Fetch experts: proportional control through a few phases that are read off the observation.

The state holds gripper position (0:3), block position (3:6), block minus gripper (6:9) and finger openings (9:11).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipole.envs.spec import Observation

GAIN = 10.0  # an action of 1 moves 5 cm, so errors above 10 cm are saturated
ABOVE = np.array([0.0, 0.0, 0.08])
OPEN, CLOSED = 1.0, -1.0
GRASPED = 0.025  # finger opening below which they hold the 5 cm block between them
BEHIND = 0.085  # m from the block's middle to where pushing starts; half a block, half a finger and a margin


class FetchExpert:
    """Acts on Reach, Push or PickAndPlace."""

    def __init__(self, task: str) -> None:
        self._policy = {"Reach": _reach, "Push": _push, "PickAndPlace": _pick_and_place}[task]

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes: there is nothing to remember."""

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the actions, clipped to [-1, 1]."""
        states, goals = obs["observation.state"].astype(np.float64), obs["observation.goal"].astype(np.float64)
        actions = [self._policy(state, goal) for state, goal in zip(states, goals, strict=True)]
        clipped: np.ndarray = np.clip(np.stack(actions), -1, 1).astype(np.float32)
        return clipped


def _towards(gripper: np.ndarray, target: np.ndarray, fingers: float) -> np.ndarray:
    return np.append(GAIN * (target - gripper), fingers)


def _reach(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return _towards(state[:3], goal, CLOSED)


def _pick_and_place(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    gripper, block, relative, fingers = state[:3], state[3:6], state[6:9], state[9:11]
    aside, high = np.linalg.norm(relative[:2]), abs(relative[2])
    if (aside > 0.02 and high > 0.03) or aside > 0.05:
        return _towards(gripper, block + ABOVE, OPEN)
    if high > 0.012:
        return _towards(gripper, block, OPEN)
    if fingers.sum() > 2 * GRASPED:
        return _towards(gripper, block, CLOSED)
    return _towards(gripper, goal + (gripper - block), CLOSED)


def _push(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    gripper, block = state[:3], state[3:6]
    way = goal[:2] - block[:2]
    far = np.linalg.norm(way)
    way = way / max(far, 1e-6)
    low = block[2]
    start = np.append(block[:2] - BEHIND * way, low)
    offset = gripper[:2] - block[:2]
    behind = -float(offset @ way)
    aside = abs(float(offset @ np.array([-way[1], way[0]])))
    if gripper[2] > low + 0.02:
        over = np.linalg.norm(gripper[:2] - start[:2]) < 0.02
        return _towards(gripper, start if over else start + ABOVE, CLOSED)
    if aside > 0.02 or behind < 0.03:
        return _towards(gripper, np.append(gripper[:2], low + ABOVE[2]), CLOSED)
    # Slow down on the way in, as the block slides on.
    ahead = np.append(gripper[:2] + min(far, 0.06) * way, low)
    return _towards(gripper, ahead, CLOSED)
