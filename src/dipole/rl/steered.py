"""A policy whose initial noise is chosen by an actor: what DSRL leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import Random
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.rl.actors import TanhGaussian
from dipole.rl.critics import Activation
from dipole.rl.wrapped import WrappedConfig, Wrapping, base_values, local


@dataclass(frozen=True)
class SteeredConfig(WrappedConfig):
    """A steered policy.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
        sampler: The deterministic sampler it was steered with.
        feature_dim: F.
        noise_dim: Components of noise the actor chooses.
        noise_bound: They lie in [-b, b].
        hidden: Hidden layers of the actor.
        activation: Their nonlinearity.
    """

    sampler: SamplerConfig
    feature_dim: int
    noise_dim: int
    noise_bound: float
    hidden: tuple[int, ...]
    activation: Activation


def spread(noise: Tensor, positions: int, action_dim: int) -> Tensor:
    """Return noise `[n, m Da]` as `[n, positions, Da]`, repeated from the beginning where it is shorter."""
    steps = noise.reshape(len(noise), -1, action_dim)
    return steps.repeat(1, -(-positions // steps.shape[1]), 1)[:, :positions]


class SteeredPolicy(Wrapping):
    """The policy; acts without randomness: the actor's mode is denoised."""

    config_class = SteeredConfig
    type_name = "steered"
    config: SteeredConfig

    def __init__(self, config: SteeredConfig, normalizer: Normalizer) -> None:
        super().__init__(config, normalizer)
        self.actor = TanhGaussian(config.feature_dim, config.noise_dim, config.hidden, config.activation, True)

    @classmethod
    def of(cls, base: Any, actor: TanhGaussian, config: Any) -> SteeredPolicy:
        """Return the policy of a base and an actor, shared and not copied (`config`: a `DSRLConfig`)."""
        base = local(base, "actor")
        first = actor.net[0]
        assert isinstance(first, nn.Linear)
        own = SteeredConfig(
            **base_values(base),
            sampler=base.sampler,
            feature_dim=first.in_features,
            noise_dim=actor.action_dim,
            noise_bound=config.noise_bound,
            hidden=tuple(config.hidden),
            activation=config.activation,
        )
        return cls.sharing(base, own, actor=actor)

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; a `noise` given is used in place of the actor's."""
        features, cond = self.features(obs)
        if noise is None:
            chosen = self.config.noise_bound * self.actor.mode(features)
            noise = spread(chosen, self.pred_horizon, self.action_dim)
        return self.denoised(cond, noise, generator), state
