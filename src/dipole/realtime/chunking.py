"""Real-time chunking: the robot moves on while the next chunk is computed, and the two chunks fit together.

Source: Black et al., "Real-Time Execution of Action Chunking Flow Policies" (2025). When a call begins, the first d
actions (the inference delay, in env steps) are already decided: they are those of the previous chunk. The new chunk is
inpainted around them. With Y the previous chunk moved up and W its weights, 1 on what is decided, falling to 0 towards
the end of the overlap, the denoiser's answer is corrected at every step by a vector-Jacobian product,

    x0_hat' = x0_hat + sigma min(beta, (alpha^2 + sigma^2) / (alpha sigma)) (dx0_hat/dx)^T W (Y - x0_hat).

The unclipped factor is that of pseudo-inverse guidance (Song et al. 2023) for data of unit variance: in the paper's
clock tau = 1 - t, where alpha = tau and sigma = 1 - tau, it is the paper's (1 - tau) min(beta, (1 - tau)/(tau r^2)).
Written in alpha and sigma it holds for every process: a diffusion process is a flow seen at another scale and clock,
and the formula does not depend on either. So diffusion policies can be run this way as well.

In an environment without latency `delay` plays it: what is returned begins with the d actions decided before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.diffusion import Denoiser, Inpaint, Process
from dipole.diffusion.denoiser import prepare
from dipole.diffusion.tensors import Level, Random, expand
from dipole.errors import DipoleError
from dipole.policies.policy import Observation, State
from dipole.realtime.base import RealtimePolicy, rows_of, shifted


@dataclass(frozen=True)
class ChunkingConfig:
    """How a chunk is fitted to the previous one.

    Attributes:
        delay: d, env steps between an observation and the first action that can depend on it.
        guidance: `pseudo-inverse` (the formula above); `replace`: x0_hat is overwritten where the actions are decided,
            and nothing is asked of the rest of the overlap; `none`: the new chunk takes over at d, however far from the
            old one it is.
        beta: Bound on the guidance weight; the paper uses 5.
        soft: Weights fall over the overlap as in the paper; False: 1 on what is decided and 0 elsewhere.
    """

    delay: int = 0
    guidance: Literal["pseudo-inverse", "replace", "none"] = "pseudo-inverse"
    beta: float = 5.0
    soft: bool = True


class ChunkingPolicy(RealtimePolicy):
    """A policy whose chunks continue one another.

    State: `chunk` `[B, Tp, Da]`, the previous one as it was executed, normalised, and `warm` `[B]`, whether there is
    one.

    Attributes:
        weights: `[Tp]`, W.
    """

    weights: Tensor

    def __init__(self, policy: Any, options: ChunkingConfig) -> None:
        super().__init__(policy, options)
        room = min(policy.action_horizon, policy.pred_horizon - policy.action_horizon - policy.obs_horizon + 1)
        if not 0 <= options.delay <= room:
            raise DipoleError(
                f"delay {options.delay} env steps: the previous chunk has actions for 0 to {max(0, room)} steps after "
                "it was executed; raise pred_horizon or lower action_horizon"
            )
        if not options.beta > 0:
            raise DipoleError(f"beta {options.beta}: above 0")
        decided = policy.obs_horizon - 1 + options.delay
        weights = overlap_weights(policy.pred_horizon, decided, policy.action_horizon)
        self.register_buffer("weights", weights if options.soft else weights.floor(), persistent=False)

    @property
    def decided(self) -> int:
        """Return how many positions of a chunk are settled before it is computed: the past and the delay."""
        return self.obs_horizon - 1 + int(self.options.delay)

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes: no previous chunk."""
        return {"chunk": self._empty_chunks(batch), "warm": self._no_rows(batch)}

    # Not in inference mode, even where the caller is: guidance takes gradients.
    @torch.inference_mode(False)
    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; see `Policy.act`."""
        cond, warm = self.encode(obs), state["warm"]
        known = shifted(state["chunk"], self.action_horizon)

        def guide(denoiser: Denoiser, process: Process) -> Denoiser:
            if self.options.guidance == "replace":
                return Inpaint(denoiser, known, self._settled(warm))
            return PrefixGuidance(denoiser, process, known, self._row_weights(warm), self.options.beta)

        chosen = guide if self.options.guidance != "none" and bool(warm.any()) else None
        x0 = self.policy.denoise(cond, noise, generator, guide=chosen)
        x0 = torch.where(self._settled(warm), known, x0)
        return self.executed(x0), {"chunk": x0, "warm": torch.ones_like(warm)}

    def _settled(self, warm: Tensor) -> Tensor:
        """Return which entries are settled, bool `[B, Tp, 1]`."""
        position = torch.arange(self.pred_horizon, device=warm.device)
        return (warm[:, None] & (position < self.decided)).unsqueeze(-1)

    def _row_weights(self, warm: Tensor) -> Tensor:
        """Return W `[B, Tp, 1]`, 0 in the rows without a previous chunk: there guidance adds exactly nothing."""
        weights = self.weights.expand(len(warm), -1)
        return rows_of(warm, weights, torch.zeros_like(weights)).unsqueeze(-1)


def overlap_weights(pred_horizon: int, decided: int, shift: int) -> Tensor:
    """Return W `[Tp]`: 1 before `decided`, then falling to 0 where the previous chunk ends (eq. 5 of the paper).

    Args:
        pred_horizon: Tp.
        decided: Positions that are settled.
        shift: Env steps between two calls: the previous chunk covers the first Tp - shift positions.
    """
    position = torch.arange(pred_horizon, dtype=torch.float64)
    end = pred_horizon - shift
    c = (end - position) / (end - decided + 1)
    falling = c * torch.expm1(c) / (math.e - 1)
    weights = torch.where(position < decided, torch.ones_like(c), torch.where(position < end, falling, 0.0))
    return weights.float()


@dataclass(frozen=True)
class PrefixGuidance:
    """A denoiser drawn towards known values, by pseudo-inverse guidance (see the module).

    Unlike `GradientGuidance` it is defined where there is no signal (alpha = 0): the weight is beta there.

    Attributes:
        denoiser: The denoiser to guide; gradients are taken through it.
        process: Its process.
        known: Y, clean values `[B, T, D]`.
        weights: W, broadcastable to Y.
        beta: Bound on the weight.
    """

    denoiser: Denoiser
    process: Process
    known: Tensor
    weights: Tensor
    beta: float = 5.0

    def __call__(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        """Return the corrected x0_hat, shaped as `x`."""
        with torch.enable_grad():
            start = x.detach().clone().requires_grad_()
            x0_hat = self.denoiser(start, t, cond)
            found = x0_hat.detach()
            (push,) = torch.autograd.grad(x0_hat, start, (self.weights * (self.known - found)).to(found))
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        factor = torch.minimum(self.beta * sigma, (alpha**2 + sigma**2) / alpha)
        corrected: Tensor = found + expand(factor, x).to(x) * push
        return corrected

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare the denoiser."""
        return replace(self, denoiser=prepare(self.denoiser, levels, cond))
