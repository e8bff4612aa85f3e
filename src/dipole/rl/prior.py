"""A policy whose initial noise comes from a learnt Gaussian instead of the standard one: what FIND leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion.normal import Reduce
from dipole.diffusion.tensors import Random, randn
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.rl.wrapped import WrappedConfig, Wrapping, base_values, local

SMALLEST_STD = 1e-4


class NoisePrior(nn.Module):
    """N(mu, diag s^2) over noise `[d]`; at first the standard normal distribution.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(dim))
        self.log_std = nn.Parameter(torch.zeros(dim))

    @property
    def std(self) -> Tensor:
        """Return s `[d]`, at least 1e-4."""
        return self.log_std.clamp(min=math.log(SMALLEST_STD)).exp()

    def forward(self, normal: Tensor) -> Tensor:
        """Return noise for standard normal numbers `[n, d]`."""
        return self.mean + self.std * normal

    def log_prob(self, noise: Tensor, reduce: Reduce = "sum") -> Tensor:
        """Return the log-density `[n]` of noise `[n, d]`, summed or averaged over the components (or `none`)."""
        std = self.std
        value = -0.5 * ((noise - self.mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        if reduce == "none":
            return value
        return value.sum(-1) if reduce == "sum" else value.mean(-1)

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal distribution, sum 1/2 (mu^2 + s^2 - 1) - log s."""
        std = self.std
        return (0.5 * (self.mean.square() + std.square() - 1) - std.log()).sum()

    def distance(self) -> Tensor:
        """Return sum 1/2 mu^2 + (s - 1)^2, to which `kl` agrees up to second order."""
        return (0.5 * self.mean.square() + (self.std - 1).square()).sum()


@dataclass(frozen=True)
class PriorConfig(WrappedConfig):
    """A policy with a noise prior.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
        sampler: The deterministic sampler the prior was found with.
    """

    sampler: SamplerConfig


class PriorPolicy(Wrapping):
    """The policy. Noise given to `act` is standard normal, as for any policy: the prior shifts and scales it."""

    config_class = PriorConfig
    type_name = "prior"
    config: PriorConfig

    def __init__(self, config: PriorConfig, normalizer: Normalizer) -> None:
        super().__init__(config, normalizer)
        self.prior = NoisePrior(self.pred_horizon * self.action_dim)

    @classmethod
    def of(cls, base: Any, prior: NoisePrior) -> PriorPolicy:
        """Return the policy of a base and a prior, shared and not copied."""
        base = local(base, "prior")
        return cls.sharing(base, PriorConfig(**base_values(base), sampler=base.sampler), prior=prior)

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; `noise` `[B, Tp, Da]` is standard normal."""
        features, cond = self.features(obs)
        if noise is None:
            noise = randn((len(features), self.pred_horizon, self.action_dim), generator, like=features)
        shaped = self.prior(noise.flatten(1)).view_as(noise)
        return self.denoised(cond, shaped, generator), state
