"""A tiny environment and policies written by hand, so that rollouts are tested against nothing but themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dipole.data.features import Feature
from dipole.envs.spec import EnvSpec, StepResult


class ToyEnv:
    """A point on a line wanders to 1; an episode's start, wind and length depend on its seed."""

    def __init__(self, num_envs=1, max_steps=30, score="success", state_dim=3, render=True):
        self.num_envs, self.renders = num_envs, render
        self.spec = EnvSpec(
            name="toy",
            observation={"observation.state": Feature("float32", (state_dim,))},
            action=Feature("float32", (2,)),
            action_low=np.full(2, -1, np.float32),
            action_high=np.full(2, 1, np.float32),
            max_steps=max_steps,
            fps=10.0,
            task="wander to one",
            score=score,
        )
        self.position, self.wind = np.zeros((num_envs, state_dim)), np.zeros((num_envs, state_dim))
        self.clock, self.patience = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.log = []

    def reset(self, rows, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            rng = np.random.default_rng(seed)
            self.position[row], self.wind[row] = rng.normal(size=(2, self.position.shape[1]))
            self.clock[row], self.patience[row] = 0, rng.integers(3, 25)
        self.log.append(("reset", list(rows), list(seeds)))
        return self._obs(rows)

    def step(self, actions, rows):
        assert np.abs(actions).max() <= 1
        rows = np.array(rows)
        self.clock[rows] += 1
        self.position[rows, :2] += 0.1 * actions
        self.position[rows] += 0.02 * self.wind[rows]
        reward = np.cos(self.position[rows]).sum(1).astype(np.float32)
        success = self.position[rows, 0] > 1
        terminated = self.clock[rows] >= self.patience[rows]
        truncated = ~terminated & (self.clock[rows] >= self.spec.max_steps)
        return StepResult(self._obs(rows), reward, terminated, truncated, success, [{} for _ in rows])

    def render(self, row):
        if not self.renders:
            raise RuntimeError("no graphics here")
        return np.full((20, 24, 3), int(self.clock[row]), np.uint8)

    def close(self):
        pass

    def _obs(self, rows):
        return {"observation.state": self.position[rows].astype(np.float32)}


class ToyPolicy(nn.Module):
    """An MLP of awkward width on To observations, noise and, if asked, a memory of what it has seen."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 2, 6, 4, 2

    def __init__(self, state_dim=3, width=33, memory=False):
        super().__init__()
        self.memory = memory
        inputs = 2 * state_dim + 6 * 2 + (5 if memory else 0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(inputs, width), nn.Mish(), nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, 8 + 5),
            )  # fmt: skip
        self.batches = []

    def initial_state(self, batch):
        return {"memory": torch.zeros(batch, 5)} if self.memory else {}

    def reset(self, state, mask):
        return {key: torch.where(mask[:, None], 0.0, value) for key, value in state.items()}

    def act(self, obs, state, noise=None, generator=None):
        x = obs["observation.state"].flatten(1)
        self.batches.append(len(x))
        noise = torch.stack([torch.randn(6, 2, generator=g) for g in generator])
        out = self.network(torch.cat([x, noise.flatten(1), *state.values()], 1))
        state = {key: torch.tanh(value + out[:, 8:]) for key, value in state.items()}
        return 3 * out[:, :8].reshape(-1, 4, 2), state


@pytest.fixture
def toys():
    return SimpleNamespace(Env=ToyEnv, Policy=ToyPolicy)
