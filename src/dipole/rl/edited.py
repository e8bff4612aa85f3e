"""Act by choosing among sampled and edited chunks: what EXPO leaves behind, and the choice it trains with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import Random
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.rl.actors import TanhGaussian
from dipole.rl.critics import Critics
from dipole.rl.wrapped import WrappedConfig, Wrapping, base_values

Edit = Callable[[Tensor, Tensor], Tensor]
"""Features `[m, F]` and actions `[m, d]` to edits `[m, d]`."""


def candidates(features: Tensor, sampled: Tensor, edit: Edit | None) -> Tensor:
    """Return the sampled actions, followed by the edited ones.

    Args:
        features: `[n, F]`.
        sampled: `[n, N, d]`.
        edit: None leaves out the edited ones.

    Returns:
        `[n, N, d]` or `[n, 2N, d]`.
    """
    if edit is None:
        return sampled
    count = sampled.shape[1]
    edits = edit(features.repeat_interleave(count, 0), sampled.flatten(0, 1))
    return torch.cat([sampled, sampled + edits.view_as(sampled)], dim=1)


def values(critics: nn.Module, features: Tensor, actions: Tensor, heads: Tensor | None) -> Tensor:
    """Return the smallest value over `heads` (or the mean over all heads), `[n, C]`, of actions `[n, C, d]`."""
    count = actions.shape[1]
    q: Tensor = critics(features.repeat_interleave(count, 0), actions.flatten(0, 1), heads)
    return (q.mean(0) if heads is None else q.amin(0)).view(len(features), count)


@dataclass(frozen=True)
class EditedConfig(WrappedConfig):
    """A policy that samples, edits and chooses.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
        sampler: How the base denoises.
        feature_dim: F.
        samples: N.
        edit_scale: beta; 0 for no edits.
        hidden: Hidden layers of the edit actor.
        critic_hidden: Of the critics.
        critics: Heads.
    """

    sampler: SamplerConfig
    feature_dim: int
    samples: int
    edit_scale: float
    hidden: tuple[int, ...]
    critic_hidden: tuple[int, ...]
    critics: int


class EditedPolicy(Wrapping):
    """The policy: of N sampled chunks and their edits (the actor's mode) the one its critics value most on average."""

    config_class = EditedConfig
    type_name = "edited"
    config: EditedConfig

    def __init__(self, config: EditedConfig, normalizer: Normalizer) -> None:
        super().__init__(config, normalizer)
        d = self.base.action_horizon * self.base.action_dim
        self.edit = TanhGaussian(config.feature_dim + d, d, config.hidden)
        self.critics: nn.Module = Critics(config.feature_dim, d, config.critic_hidden, config.critics)

    @classmethod
    def of(cls, base: Any, edit: TanhGaussian, critics: nn.Module, config: EditedConfig) -> EditedPolicy:
        """Return the policy of these parts, shared and not copied."""
        return cls.sharing(base, config, edit=edit, critics=critics)

    def _edit(self, features: Tensor, action: Tensor) -> Tensor:
        return self.config.edit_scale * self.edit.mode(torch.cat([features, action], dim=1))

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; with `noise` `[B, Tp, Da]` given, N is 1."""
        features, cond = self.features(obs)
        count = self.config.samples if noise is None else 1
        repeated = {key: value.repeat_interleave(count, 0) for key, value in cond.items()}
        if isinstance(generator, Sequence):
            generator = [g for g in generator for _ in range(count)]
        chunk = self.base.with_sampler(self.sampler).denoise(repeated, noise, generator)
        first = self.obs_horizon - 1
        sampled = chunk[:, first : first + self.action_horizon].reshape(len(features), count, -1)
        offered = candidates(features, sampled, self._edit if self.config.edit_scale else None)
        best = values(self.critics, features, offered, None).argmax(1)
        action = offered[torch.arange(len(features)), best].view(len(features), self.action_horizon, -1)
        return self.normalizer.denormalize("action", action), state


def edited_config(base: Any, feature_dim: int, expo: Any) -> EditedConfig:
    """Return the configuration for a base policy and an `EXPOConfig`."""
    return EditedConfig(
        **base_values(base),
        sampler=base.sampler,
        feature_dim=feature_dim,
        samples=expo.samples,
        edit_scale=expo.edit_scale,
        hidden=tuple(expo.hidden),
        critic_hidden=tuple(expo.hidden),
        critics=expo.critics,
    )
