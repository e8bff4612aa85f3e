"""What RDP is compared with: a policy whose chunks are planned at the same ticks, and carried out without looking."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dipole.diffusion.tensors import Random
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.policies.policy import Observation, State, reset_rows
from dipole.policies.rdp import for_rows


def with_action_horizon(policy: DiffusionPolicy, action_horizon: int) -> DiffusionPolicy:
    """Return a policy with the same weights (shared) that executes another number of actions."""
    other = copy.copy(policy)
    other.config = replace(policy.config, action_horizon=action_horizon)
    return other


class Chunked(nn.Module):
    """Plans at the first tick and whenever tick = offset modulo period; in between the chunk is carried out.

    State: `tick` `[B]`, `chunk` `[B, period, Da]` in physical units, `age` `[B]` in ticks.
    """

    def __init__(self, policy: DiffusionPolicy, period: int, offset: int = 0) -> None:
        super().__init__()
        self.policy, self.period, self.offset = with_action_horizon(policy, period), period, offset % period
        self.obs_horizon, self.pred_horizon, self.action_dim = (
            policy.obs_horizon,
            policy.pred_horizon,
            policy.action_dim,
        )
        self.action_horizon = 1

    @property
    def config(self) -> Any:
        """Return the policy's configuration."""
        return self.policy.config

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of episodes."""
        zero = torch.zeros(batch, dtype=torch.long)
        return {"tick": zero, "age": zero.clone(), "chunk": torch.zeros(batch, self.period, self.action_dim)}

    def reset(self, state: State, mask: Tensor) -> State:
        """Return the state with some rows at the start of an episode."""
        return reset_rows(state, self.initial_state(len(mask)), mask)

    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, 1, Da], state)`; see `Policy.act`."""
        tick, chunk, age = state["tick"], state["chunk"], state["age"]
        due = (tick == 0) | (tick % self.period == self.offset)
        if due.any():
            fresh, _ = self.policy.act(obs, {}, noise, for_rows(generator, due))
            chunk = torch.where(due[:, None, None], fresh, chunk)
            age = torch.where(due, 0, age)
        action = chunk[torch.arange(len(tick)), age]
        return action.unsqueeze(1), {"tick": tick + 1, "age": age + 1, "chunk": chunk}
