"""Best of n attempts, against the closed form for a coin."""

import numpy as np
import torch

from dipole.envs import make
from dipole.rl.ceiling import best_of_n


class Coin:
    """Walks to the right goal with probability 0.3, else to the left one: decided by the noise of the first call."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 1, 32, 32, 2

    def initial_state(self, batch):
        return {}

    def reset(self, state, mask):
        return {}

    def act(self, obs, state, noise=None, generator=None):
        right = torch.rand(len(obs["observation.state"]), generator=generator) < 0.3
        chunk = torch.zeros(len(right), 32, 2)
        chunk[:, :, 0] = torch.where(right, 1.5, -1.5)[:, None]
        return chunk, {}


def test_best_of_n_of_a_coin():
    reached = best_of_n(Coin(), make("micro/two_goal", 64), list(range(100_000, 100_400)), 4)
    assert reached.shape == (4, 400)
    assert (np.diff(reached.astype(int), axis=0) >= 0).all()
    for k, share in enumerate(reached.mean(1), start=1):
        assert abs(share - (1 - 0.7**k)) < 0.1  # four standard errors of 400 coins
