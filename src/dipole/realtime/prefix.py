"""A policy whose chunk continues actions it is told of: real-time chunking with a delay that varies from call to call.

`ChunkingPolicy` knows its delay in advance and the previous chunk from its own memory. Here whoever executes the chunks
says, with each call, what is planned from now on and how many of those actions will have been executed when the answer
comes (`Request.planned` and `Request.delay`); with a real network both change. The inpainting is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.diffusion import Denoiser, Process
from dipole.diffusion.tensors import Random
from dipole.policies.policy import Observation, State
from dipole.realtime.base import RealtimePolicy
from dipole.realtime.chunking import PrefixGuidance, overlap_weights
from dipole.realtime.execution import Request


class PrefixPolicy(RealtimePolicy):
    """A policy that is told the plan. Its chunks have all Tp - To + 1 actions from now on.

    State: `planned` `[B, Tp, Da]`, normalised, `weights` `[B, Tp]`, how much each position counts, and `delay` `[B]`.
    It is written by `told` before every call, and forgotten by the call.

    Args:
        policy: A trained policy; its own state must be empty.
        beta: Bound on the guidance weight.
    """

    def __init__(self, policy: Any, beta: float = 5.0) -> None:
        super().__init__(policy, None)
        self.beta = beta

    @property
    def action_horizon(self) -> int:
        """Return Tp - To + 1."""
        return self.pred_horizon - self.obs_horizon + 1

    def initial_state(self, batch: int) -> State:
        """Return the state in which nothing is planned."""
        planned = self._empty_chunks(batch)
        delay = torch.zeros(batch, dtype=torch.int64, device=planned.device)
        return {"planned": planned, "weights": planned[..., 0].clone(), "delay": delay}

    def told(self, requests: Sequence[Request]) -> State:
        """Return the state in which each row is told of one request's plan; a plan longer than a chunk is cut."""
        state = self.initial_state(len(requests))
        first = self.obs_horizon - 1
        for row, request in enumerate(requests):
            count = min(len(request.planned), self.action_horizon)
            if count == 0:
                continue
            delay = min(request.delay, count)
            actions = torch.as_tensor(np.array(request.planned[:count]), device=state["planned"].device)
            state["planned"][row, first : first + count] = self.normalizer.normalize("action", actions.float())
            weights = overlap_weights(self.pred_horizon, first + delay, self.pred_horizon - first - count)
            weights[:first] = 0  # what was done before is not told
            state["weights"][row] = weights
            state["delay"][row] = delay
        return state

    # Not in inference mode, even where the caller is: guidance takes gradients.
    @torch.inference_mode(False)
    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Tp - To + 1, Da] in physical units, state)`; the first `delay` actions are as planned."""
        planned, weights = state["planned"], state["weights"].unsqueeze(-1)

        def guide(denoiser: Denoiser, process: Process) -> Denoiser:
            return PrefixGuidance(denoiser, process, planned, weights, self.beta)

        chosen = guide if bool((weights > 0).any()) else None
        x0 = self.policy.denoise(self.encode(obs), noise, generator, guide=chosen)
        position = torch.arange(self.pred_horizon, device=x0.device) - (self.obs_horizon - 1)
        settled = (position >= 0) & (position < state["delay"][:, None])
        x0 = torch.where(settled.unsqueeze(-1), planned, x0)
        return self.executed(x0), self.initial_state(len(x0))
