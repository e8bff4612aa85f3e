"""A chunked policy corrected at every step by a small residual: what ResiP leaves behind, and what it trains.

    a = a_base + scale r,     r = mu(features, a_base [, phase])

`Queues` holds the chunk of every environment row on its own, so that a row that begins an episode never executes
another episode's plan; looking at the next action does not take it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import Random, randn
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.rl.base import Base
from dipole.rl.critics import mlp
from dipole.rl.wrapped import WrappedConfig, Wrapping, base_values


class Queues:
    """An observer (see `rollouts`) whose features are the base's, its next action, and the phase if asked for.

    Args:
        base: The base policy.
        num_envs: Rows.
        show_phase: Append the position in the chunk, from 0 to 1.

    Attributes:
        calls: Rows for which the base was asked for a chunk, so far.
    """

    def __init__(self, base: Base, num_envs: int, show_phase: bool) -> None:
        self.base, self.show_phase = base, show_phase
        self.chunk = torch.zeros(num_envs, base.action_horizon, base.action_dim)
        self.place = torch.full((num_envs,), base.action_horizon)
        self.calls = 0

    @property
    def feature_dim(self) -> int:
        """Return the width of what the residual sees."""
        return int(self.base.feature_dim + self.base.action_dim + self.show_phase)

    def __call__(self, obs: dict[str, Tensor], rows: Sequence[int], begins: bool, generator: Generator) -> Tensor:
        """Return `[n, feature_dim]`; rows that begin forget their chunk, the others go on to its next action."""
        features, index = self.base.features(obs), torch.tensor(list(rows))
        self.place[index] = self.base.action_horizon if begins else self.place[index] + 1
        empty = self.place[index] >= self.base.action_horizon
        if bool(empty.any()):
            fresh = self.base.executed(self.base.chunk(features[empty], generator=generator))
            self.chunk[index[empty]], self.place[index[empty]] = fresh, 0
            self.calls += int(empty.sum())
        return residual_input(features, self.chunk[index, self.place[index]], self.phase(index))

    def phase(self, index: Tensor) -> Tensor | None:
        """Return how far each row is in its chunk, `[n]`, if that is shown."""
        return self.place[index] / self.base.action_horizon if self.show_phase else None

    def base_action(self, seen: Tensor) -> Tensor:
        """Return the base's action `[n, Da]`, normalised, that is part of what the residual saw."""
        start = self.base.feature_dim
        return seen[:, start : start + self.base.action_dim]

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        return {"chunk": self.chunk, "place": self.place}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self.chunk, self.place = state["chunk"].clone(), state["place"].clone()


def residual_input(features: Tensor, action: Tensor, phase: Tensor | None) -> Tensor:
    """Return what the residual sees, `[n, F + Da (+ 1)]`."""
    return torch.cat([features, action] + ([] if phase is None else [phase[:, None].to(features.dtype)]), dim=1)


class Residual(nn.Module):
    """The mean of the residual, `[n, F']` -> `[n, Da]`; exactly 0 at the start."""

    def __init__(self, feature_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = nn.Sequential(mlp([feature_dim, *hidden], "relu"), nn.ReLU())
        self.head = nn.Linear(hidden[-1], action_dim, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, seen: Tensor) -> Tensor:
        """Return the mean."""
        mean: Tensor = self.head(self.body(seen))
        return mean


@dataclass(frozen=True)
class ResidualConfig(WrappedConfig):
    """A residual policy.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
        sampler: How the base denoises.
        feature_dim: F.
        hidden: Hidden layers of the residual.
        scale: Of the residual, in normalised units.
        show_phase: Whether the residual sees the position in the chunk.
    """

    sampler: SamplerConfig
    feature_dim: int
    hidden: tuple[int, ...]
    scale: float
    show_phase: bool


class ResidualPolicy(Wrapping):
    """The policy: returns one action at a time and remembers the rest of the base's chunk."""

    config_class = ResidualConfig
    type_name = "residual"
    config: ResidualConfig

    def __init__(self, config: ResidualConfig, normalizer: Normalizer) -> None:
        super().__init__(config, normalizer)
        width = config.feature_dim + self.base.action_dim + config.show_phase
        self.residual = Residual(width, self.base.action_dim, config.hidden)

    @classmethod
    def of(cls, base: Base, residual: Residual, hidden: tuple[int, ...], scale: float, phase: bool) -> ResidualPolicy:
        """Return the policy of a base and a residual, shared and not copied."""
        config = ResidualConfig(
            **base_values(base.policy),
            sampler=base.policy.sampler,
            feature_dim=base.feature_dim,
            hidden=hidden,
            scale=scale,
            show_phase=phase,
        )
        return cls.sharing(base.policy, config, residual=residual)

    @property
    def action_horizon(self) -> int:
        """Return 1: the residual looks before every action."""
        return 1

    def initial_state(self, batch: int) -> State:
        """Return an empty chunk `[B, Ta, Da]` of which nothing is left (`place` `[B]`)."""
        horizon = self.base.action_horizon
        return {"chunk": torch.zeros(batch, horizon, self.action_dim), "place": torch.full((batch,), horizon)}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(action [B, 1, Da] in physical units, state)`; rows whose chunk is used up ask the base."""
        features, cond = self.features(obs)
        chunk, place, horizon = state["chunk"], state["place"], self.base.action_horizon
        empty = place >= horizon
        if bool(empty.any()):
            fresh = self._plan(cond, empty, noise, generator)
            chunk = torch.where(empty[:, None, None], fresh, chunk)
            place = torch.where(empty, torch.zeros_like(place), place)
        action = chunk[torch.arange(len(place)), place]
        phase = place / horizon if self.config.show_phase else None
        action = action + self.config.scale * self.residual(residual_input(features, action, phase))
        state = {"chunk": chunk, "place": place + 1}
        return self.normalizer.denormalize("action", action)[:, None], state

    def _plan(self, cond: dict[str, Tensor], empty: Tensor, noise: Tensor | None, generator: Random) -> Tensor:
        """Return chunks `[B, Ta, Da]` of all rows; only the generators of `empty` ones advance."""
        if noise is None:
            like, shape = next(iter(cond.values())), (len(empty), self.pred_horizon, self.action_dim)
            noise = randn(shape, generator, like, drawing=empty.tolist())
        if isinstance(generator, Sequence):
            generator = [g if e else Generator(g.device) for g, e in zip(generator, empty.tolist(), strict=True)]
        chunk = self.base.with_sampler(self.sampler).denoise(cond, noise, generator)
        first = self.obs_horizon - 1
        executed: Tensor = chunk[:, first : first + self.base.action_horizon]
        return executed
