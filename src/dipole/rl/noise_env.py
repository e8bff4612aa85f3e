"""A gymnasium environment whose action is the noise a frozen policy denoises: DSRL for any agent (say, one's own SAC).

One `step` denoises a whole chunk and executes it; the reward is the sum over it. Needs `sample(cond, w)` only: any
deterministic policy will do, a remote one too.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from dipole.envs import make
from dipole.errors import DipoleError
from dipole.rl.base import Base
from dipole.rl.experience import Decision
from dipole.rl.rollouts import Collector
from dipole.rl.steered import spread
from dipole.training.seeding import generator


class NoiseEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The latent decision process of a policy.

    Args:
        policy: A deterministic policy without memory.
        env: Name of the environment.
        noise_bound: The action space is [-b, b]^d.
        noise_steps: Noise of the first so many positions is chosen and repeated; None for all.
        seed: Of the episodes, for resets without a seed.
        env_options: Passed to `dipole.envs.make`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's own declaration)
    render_mode = "rgb_array"

    def __init__(
        self,
        policy: Any,
        env: str,
        noise_bound: float = 1.5,
        noise_steps: int | None = None,
        seed: int = 0,
        **env_options: Any,
    ) -> None:
        self._env = make(env, 1, **env_options)
        self.base = Base(policy, self._env)
        self.base.need_deterministic("dsrl")
        steps = self.base.pred_horizon if noise_steps is None else noise_steps
        if not 1 <= steps <= self.base.pred_horizon:
            raise DipoleError(f"noise_steps {steps}: the policy's chunk has {self.base.pred_horizon} positions")
        dim = steps * self.base.action_dim
        self.action_space = gymnasium.spaces.Box(-noise_bound, noise_bound, (dim,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.base.feature_dim,), np.float32)
        self._seed, self._resets = seed, 0
        self._collector: Collector | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Any]:
        """Begin an episode; a `seed` chooses it."""
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._resets = seed, 0
        self._resets += 1
        self._collector = Collector(
            lambda: self._env,
            lambda obs, rows, begins, random: self.base.features(obs),
            self.base.keys,
            self.base.obs_horizon,
            self._seed * 1_000_003 + self._resets,
        )
        return self._observe(self._collector.first()), {}

    def chunk(self, noise: np.ndarray) -> np.ndarray:
        """Return the actions `[Ta, Da]` that `noise` `[d]` leads to at the present observation."""
        if self._collector is None:
            raise DipoleError("call reset before the first step")
        return self._denoise(self._collector.first(), noise)[0].numpy()

    def _denoise(self, features: torch.Tensor, noise: np.ndarray) -> torch.Tensor:
        w = torch.as_tensor(np.asarray(noise, dtype=np.float32)).view(1, -1)
        base = self.base
        whole = base.chunk(features, spread(w, base.pred_horizon, base.action_dim), generator(0, "unused"))
        return base.physical(base.executed(whole))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Denoise `action` `[d]` and execute the chunk."""
        if self._collector is None:
            raise DipoleError("call reset before the first step")
        before = self._collector.env_steps
        one = self._collector.collect(lambda features, random: Decision(self._denoise(features, action)), 1)
        info = {"env_steps": self._collector.env_steps - before}
        ends = bool(one.terminated[0, 0]), bool(one.truncated[0, 0])
        if any(ends):
            info["success"] = self._collector.recent[-1][0]
        return self._observe(one.next_features[0]), float(one.reward[0, 0]), *ends, info

    def _observe(self, features: torch.Tensor) -> np.ndarray:
        return features.reshape(-1).numpy().astype(np.float32)

    def render(self) -> Any:
        """Return a picture."""
        return self._env.render(0)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
