"""Temporal ensembling: execute the weighted average of all chunks that have predicted an action for this env step.

Source: Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (ACT, 2023). The k-th chunk
that predicted a step, counted from the oldest, k = 0, has weight exp(-decay k): positive decay trusts the old more. The
average is kept as it grows, so that memory does not depend on how many chunks overlap.

It suits chunks that agree. Where a policy chooses anew between two ways, their average may be neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.tensors import Random
from dipole.policies.policy import Observation, State
from dipole.realtime.base import RealtimePolicy, shifted


@dataclass(frozen=True)
class EnsembleConfig:
    """How chunks are averaged.

    Attributes:
        decay: ACT's m; 0 weighs all chunks alike.
    """

    decay: float = 0.01


class EnsemblePolicy(RealtimePolicy):
    """A policy that executes averages over its overlapping chunks; with Ta = 1, as ACT does, Tp - To + 1 of them.

    State, for the positions of the next chunk: `average` `[B, Tp, Da]`, normalised, and `count` `[B, Tp]`, of how many
    chunks.
    """

    def __init__(self, policy: Any, options: EnsembleConfig) -> None:
        super().__init__(policy, options)

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes: no chunks."""
        average = self._empty_chunks(batch)
        return {"average": average, "count": torch.zeros_like(average[..., 0])}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; see `Policy.act`."""
        x0 = self.policy.denoise(self.encode(obs), noise, generator)
        count = state["count"]
        newest = torch.exp(-self.options.decay * count)
        share = (newest / (newest + self._weight_of(count))).unsqueeze(-1)
        # Where nothing was averaged before, the share is 1 and the new prediction is taken as it is.
        average = torch.where(share == 1, x0, state["average"] + share * (x0 - state["average"]))
        moved = {
            "average": shifted(average, self.action_horizon),
            "count": _gone(shifted(count.unsqueeze(-1) + 1, self.action_horizon), self.action_horizon),
        }
        return self.executed(average), moved

    def _weight_of(self, count: Tensor) -> Tensor:
        """Return the sum of the first `count` weights."""
        decay = self.options.decay
        if decay == 0:
            return count
        return torch.expm1(-decay * count) / torch.expm1(torch.tensor(-decay)).to(count)


def _gone(count: Tensor, by: int) -> Tensor:
    """Return counts `[B, Tp]` with 0 at the end, where no chunk has reached yet."""
    count = count.squeeze(-1).clone()
    count[:, max(0, count.shape[1] - by) :] = 0
    return count
