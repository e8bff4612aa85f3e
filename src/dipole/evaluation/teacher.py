"""A trained policy as a demonstrator: what `dipole collect --teacher` records."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipole.data.features import single_precision
from dipole.envs.spec import Observation, VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.blocks import BlockCaller, acting, device_of
from dipole.evaluation.rollout import observation_keys
from dipole.evaluation.seeds import policy_generator
from dipole.policies.policy import Policy, put_rows, take_rows


class Teacher:
    """A policy with the interface of a scripted expert (`dipole.envs.experts.expert.Expert`).

    Every row is answered on its own, so that an episode depends on its seed alone.

    Args:
        policy: The policy.
        env: Where it acts.

    Raises:
        DipoleError: Its observations or actions are not those of the environment.
    """

    def __init__(self, policy: Policy, env: VectorEnv) -> None:
        self.policy, self.spec, self._num_rows = policy, env.spec, env.num_envs
        self.keys = observation_keys(policy, env)
        self._device = device_of(policy)
        self._caller = BlockCaller(policy, 1, self._device)
        self._state = policy.initial_state(env.num_envs)
        self._seen: dict[int, deque[dict[str, np.ndarray]]] = {}
        self._queue: dict[int, deque[np.ndarray]] = {}
        self._generators: dict[int, torch.Generator] = {}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes in `rows`; see `Expert.reset`."""
        mask = torch.zeros(self._num_rows, dtype=torch.bool)
        for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            first = self._picked(obs, i)
            self._seen[row] = deque([first] * self.policy.obs_horizon, self.policy.obs_horizon)
            self._queue[row] = deque()
            self._generators[row] = policy_generator(seed, self._device)
            mask[row] = True
        self._state = self.policy.reset(self._state, mask.to(self._device))

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the next action of each of `rows`, float32 `[len(rows), Da]`; see `Expert.act`."""
        for i, row in enumerate(rows):
            # The first observation of an episode is met again here: there the past is that observation anyway.
            self._seen[row].append(self._picked(obs, i))
        empty = [row for row in rows if not self._queue[row]]
        if empty:
            self._plan(empty)
        actions = np.stack([self._queue[row].popleft() for row in rows])
        clipped: np.ndarray = np.clip(actions, self.spec.action_low, self.spec.action_high).astype(np.float32)
        return clipped

    def _plan(self, rows: list[int]) -> None:
        """Ask the policy for chunks."""
        obs = {
            key: torch.from_numpy(np.stack([np.stack([one[key] for one in self._seen[row]]) for row in rows]))
            for key in self.keys
        }
        index = torch.tensor(rows, device=self._device)
        with acting(self.policy):
            chunks, state = self._caller.act(
                obs, take_rows(self._state, index), [0] * len(rows), [self._generators[row] for row in rows]
            )
        self._state = put_rows(self._state, index, state)
        if not bool(torch.isfinite(chunks).all()):
            raise DipoleError(
                f"the teacher gave an action for '{self.spec.name}' that is not finite: try it with `dipole eval`"
            )
        for row, chunk in zip(rows, chunks.numpy(), strict=True):
            self._queue[row].extend(chunk)

    def _picked(self, obs: Observation, i: int) -> dict[str, np.ndarray]:
        """Return what the policy sees of row `i` of `obs`, floats in single precision."""
        return {key: single_precision(obs[key][i]) for key in self.keys}


def load_teacher(path: str | Path, env: VectorEnv) -> Any:
    """Return the policy of a run as a teacher for `env`. In a worker process it computes with one thread.

    Raises:
        DipoleError: There is no policy in the folder, or it is not one for `env`.
    """
    from dipole.realtime import load

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    return Teacher(load(path), env)
