"""Streaming: a chunk of actions that is carried on half denoised; each call finishes only its first piece.

Source: Hoeg et al., "Streaming Diffusion Policy" (2024). The buffer's pieces stand on the rungs of a ladder (see
`dipole.policies.streaming`). A call denoises all positions at once, each at its own level, until the first piece is
clean: N / h network calls instead of N. Its Ta actions are executed and dropped, what is left moves up, and fresh noise
is appended. The To - 1 past positions in front are then clean actions on a rung that is not clean: they are noised
again. (The published code computes that noise and does not store it: `overlap_noise=False`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.diffusion import Kernel, add_noise, sample
from dipole.diffusion.tensors import Random, expand, randn
from dipole.errors import DipoleError
from dipole.policies.policy import Observation, State
from dipole.policies.streaming import check_divides, num_pieces, pieces, rungs
from dipole.realtime.base import RealtimePolicy, for_rows, rows_of


@dataclass(frozen=True)
class StreamingConfig:
    """How a buffer is begun and carried on.

    Attributes:
        primer: What the first buffer is made of, noised to the ladder: `zero` (normalised), `constant` (the newest
            value of `constant_from` at every position: hold still, where actions are positions), or `denoise` (a whole
            chunk, which costs N more network calls in the first call).
        constant_from: Feature whose first Da numbers are an action, for `constant`.
        overlap_noise: Noise the past positions again after each call; False for what the published code does.
    """

    primer: Literal["zero", "constant", "denoise"] = "zero"
    constant_from: str = "observation.state"
    overlap_noise: bool = True


class StreamingPolicy(RealtimePolicy):
    """A policy trained for streaming, with a carried buffer.

    State: `buffer` `[B, Tp, Da]` noisy actions at the levels `ladder`, `primed` `[B]` whether there is one.

    Attributes:
        levels: `[N/h + 1, 1, Tp]`, the levels of every position during a call; the first row is the ladder.
    """

    levels: Tensor

    def __init__(self, policy: Any, options: StreamingConfig) -> None:
        super().__init__(policy, options)
        if getattr(policy.config, "streaming", None) is None:
            raise DipoleError(
                "streaming needs a policy trained with a noise level for every position: train one with `dipole train "
                "--method sdp`"
            )
        if policy.sampler.process is not None:
            raise DipoleError("streaming denoises in the process it was trained in: leave the sampler's process out")
        kernel = policy.sampler.build()
        if not isinstance(kernel, Kernel):
            raise DipoleError(
                f"sampler '{policy.sampler.name}' cannot step every position at a level of its own: take ddpm, ddim "
                "or euler"
            )
        self.kernel = kernel
        self.register_buffer("levels", _call_levels(policy), persistent=False)

    @property
    def ladder(self) -> Tensor:
        """Return the levels `[1, Tp]` at which the positions start a call."""
        return self.levels[0]

    @property
    def nfe(self) -> int:
        """Return the network calls per chunk (without a `denoise` primer)."""
        return len(self.levels) - 1

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes: no buffer yet."""
        return {"buffer": self._empty_chunks(batch), "primed": self._no_rows(batch)}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; `noise` primes the buffers of new episodes."""
        cond = self.encode(obs)
        buffer = state["buffer"]
        if not bool(state["primed"].all()):
            fresh = self._primed(obs, cond, noise, for_rows(generator, ~state["primed"]))
            buffer = rows_of(state["primed"], buffer, fresh)
        x = sample(self.denoiser, self.process, self.levels, self.kernel, cond=cond, init=buffer, generator=generator)
        return self.executed(x), {"buffer": self._carried(x, generator), "primed": torch.ones_like(state["primed"])}

    def _primed(self, obs: Observation, cond: dict[str, Tensor], noise: Tensor | None, generator: Random) -> Tensor:
        """Return buffers `[B, Tp, Da]` on the ladder for the start of an episode."""
        like = next(iter(cond.values()))
        shape = (like.shape[0], self.pred_horizon, self.action_dim)
        if self.options.primer == "denoise":
            clean = self.policy.denoise(cond, noise, generator)
            noise = None  # it was the initial noise of that chunk
        elif self.options.primer == "constant":
            clean = self._held(obs).unsqueeze(1).expand(shape)
        else:
            clean = torch.zeros(shape, dtype=like.dtype, device=like.device)
        noise = randn(shape, generator, like=like) if noise is None else noise
        return add_noise(clean, noise, self.ladder, self.process)

    def _held(self, obs: Observation) -> Tensor:
        """Return the newest value of `constant_from` as a normalised action `[B, Da]`."""
        key = self.options.constant_from
        if key not in obs or obs[key].dim() != 3 or obs[key].shape[-1] < self.action_dim:
            raise DipoleError(
                f"primer 'constant' needs an observation of at least {self.action_dim} numbers under '{key}': set "
                "constant_from to one that holds an action, or take the primer 'zero'"
            )
        return self.normalizer.normalize("action", obs[key][:, -1, : self.action_dim])

    def _carried(self, x: Tensor, generator: Random) -> Tensor:
        """Return the next buffer from the sample at the end of a call: drop, move up, noise the past, append noise."""
        past, batch = self.obs_horizon - 1, x.shape[0]
        count = num_pieces(self.obs_horizon, self.pred_horizon, self.action_horizon)
        kept = past + (count - 1) * self.action_horizon
        ladder = self.ladder.to(x)
        # One draw serves past and tail: a row's generator is advanced alike whatever the options.
        drawn = randn((batch, past + self.pred_horizon - kept, self.action_dim), generator, like=x)
        start = drawn[:, past:] * expand(self.process.prior_std(ladder[:, kept:]), x).to(x)
        moved = x[:, self.action_horizon : self.action_horizon + kept]
        if self.options.overlap_noise and past:
            again = add_noise(moved[:, :past], drawn[:, :past], self.ladder[:, :past], self.process)
            moved = torch.cat([again, moved[:, past:]], dim=1)
        return torch.cat([moved, start], dim=1)


def _call_levels(policy: Any) -> Tensor:
    """Return the levels of a call, `[N/h + 1, 1, Tp]`, taken from the sampler's own list of N + 1."""
    horizons = (policy.obs_horizon, policy.pred_horizon, policy.action_horizon)
    count, steps = num_pieces(*horizons), policy.sampler.num_steps
    check_divides(count, steps, "steps of the sampler")
    visited = policy.sampler.levels(policy.process)
    ladder = rungs(pieces(*horizons), count, policy.process)
    first = steps - steps // count * (pieces(*horizons) + 1)
    down = torch.arange(steps // count + 1)
    levels: Tensor = visited[first[None] + down[:, None]].unsqueeze(1)
    if not torch.allclose(levels[0, 0], ladder):
        raise DipoleError(
            f"the sampler's spacing '{policy.sampler.spacing}' does not pass through the levels a streaming policy "
            "starts its calls at: leave the spacing out"
        )
    return levels
