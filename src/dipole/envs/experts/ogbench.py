"""Experts for OGBench: a waypoint follower for the point mass, and the package's own oracle for cubes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dipole.envs.experts.expert import expert_rng
from dipole.envs.experts.maze import Maze
from dipole.envs.spec import Observation

SPEED = 0.2  # distance that an action of 1 covers
_PLACED = 0.04  # m from its goal within which a cube counts as placed, as in the package


class PointExpert:
    """Heads for the next waypoint at full speed, slower at the goal."""

    def __init__(self, envs: Sequence[Any]) -> None:
        maze = envs[0].env
        self._maze = Maze(maze.maze_map.tolist(), maze._maze_unit, (-maze._offset_x, -maze._offset_y), down=False)

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes: there is nothing to remember."""

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the shifts, at most 1 long."""
        actions = []
        for xy, goal in zip(obs["observation.state"][:, :2], obs["observation.goal"][:, :2], strict=True):
            way = (self._maze.waypoint(xy, goal) - xy) / SPEED
            actions.append(way / max(1.0, float(np.linalg.norm(way))))
        return np.stack(actions).astype(np.float32)


class CubeExpert:
    """The package's Markovian oracle, which moves one cube to one place, pointed at each misplaced cube in turn."""

    def __init__(self, envs: Sequence[Any]) -> None:
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle

        self._envs = envs
        self._oracles = [CubeMarkovOracle(env=env.env) for env in envs]
        self._cube = [0] * len(envs)

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; the oracle draws where the arm comes to rest."""
        for row, seed in zip(rows, seeds, strict=True):
            rng, oracle, env = expert_rng(int(seed)), self._oracles[row], self._envs[row].env
            self._cube[row] = -1
            # What the oracle's own reset does, with a seeded generator in place of numpy's global one.
            oracle._done, oracle._step, oracle._max_step = False, 0, np.inf
            oracle._final_pos = rng.uniform(*env._arm_sampling_bounds)
            oracle._final_yaw = rng.uniform(-np.pi, np.pi)

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the oracle's actions."""
        return np.stack([self._act(row) for row in rows]).astype(np.float32)

    def _act(self, row: int) -> np.ndarray:
        env, info = self._envs[row].env, dict(self._envs[row].info)
        goals = env._data.mocap_pos[env._cube_target_mocap_ids]
        cubes = np.stack([info[f"privileged/block_{k}_pos"] for k in range(len(goals))])
        placed = np.linalg.norm(cubes - goals, axis=-1) <= _PLACED
        # Finish a cube (let go and rise) before the next; low goals first, so that stacks grow from below.
        risen = info["proprio/effector_pos"][2] > 0.16 and info["proprio/gripper_contact"] < 0.1
        if self._cube[row] < 0 or (placed[self._cube[row]] and risen and not placed.all()):
            self._cube[row] = int(np.argmin(goals[:, 2] + 10.0 * placed))
        k = self._cube[row]
        info["privileged/target_block"] = k
        info["privileged/target_block_pos"] = goals[k].copy()
        info["privileged/target_block_yaw"] = np.zeros(1)
        action: np.ndarray = self._oracles[row].select_action(None, info)
        return action
