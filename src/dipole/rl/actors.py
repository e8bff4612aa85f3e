"""Stochastic actors: a Gaussian squashed to a box by tanh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dipole.diffusion.tensors import randn
from dipole.rl.critics import Activation, mlp

LOG_STD = (-5.0, 2.0)


def tanh_log_prob(mean: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    """Return the log-density `[n]` of tanh(u), u ~ N(mean, std^2), on [-1, 1]^d.

    log N(u) - sum log(1 - tanh(u)^2), the latter as 2 (log 2 - u - softplus(-2u)), which never takes the log of 0.
    """
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class TanhGaussian(nn.Module):
    """An actor `[n, F]` -> action in [-1, 1]^d.

    The log-probability is that of the action in [-1, 1]^d: whoever scales the action by beta must not add d log beta to
    it, so that one entropy target serves every scale.

    Args:
        feature_dim: F.
        action_dim: d.
        hidden: Widths of the hidden layers.
        activation: Nonlinearity.
        layer_norm: Normalise before each nonlinearity.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.net = mlp([feature_dim, *hidden, 2 * action_dim], activation, layer_norm)
        self.action_dim = action_dim

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation before squashing, `[n, d]` each."""
        mean, raw = self.net(features).chunk(2, dim=-1)
        low, high = LOG_STD
        return mean, low + (high - low) * (torch.tanh(raw) + 1) / 2

    def forward(self, features: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return a sample `[n, d]` in [-1, 1] and its log-probability `[n]`; gradients flow through both."""
        mean, log_std = self.moments(features)
        u = mean + log_std.exp() * randn(tuple(mean.shape), generator, like=mean)
        return torch.tanh(u), tanh_log_prob(mean, log_std, u)

    def mode(self, features: Tensor) -> Tensor:
        """Return tanh(mean) `[n, d]`."""
        return torch.tanh(self.moments(features)[0])
