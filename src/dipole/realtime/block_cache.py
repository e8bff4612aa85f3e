"""Block-wise adaptive caching: residual branches whose output changes little between denoising steps are reused.

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy" (BAC, 2025). The residual stream stays live; at
every call of the network each branch is either computed and stored, or its stored output is added again. Which is which
is a schedule, found once per checkpoint and sampler by `dipole.realtime.block_schedule`.

The cache lives for one `act`: calls and rows of a batch share nothing. Works on any network with `branches`, of which
the transformer and the U-Net are the ones worth it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from dipole.diffusion.tensors import Random
from dipole.errors import DipoleError
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.realtime.backends import with_network
from dipole.realtime.base import RealtimePolicy


@dataclass(frozen=True)
class BlockCacheConfig:
    """A schedule, and what it was made for.

    Attributes:
        steps: For each branch the calls, counted from 0, at which it is computed; 0 is always one of them.
        levels: The levels visited (`[K+1]`).
        weights: Digest of the network's weights.
    """

    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    weights: str = ""


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights, as 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        sha.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def visited_levels(policy: Any) -> tuple[float, ...]:
    """Return the levels a policy's sampler visits (`[K+1]`)."""
    sampler = policy.sampler
    process = policy.process if sampler.process is None else sampler.process.build()
    return tuple(float(level) for level in sampler.levels(process))


def cacheable(policy: Any) -> str | None:
    """Return why the branches of a policy's network cannot be cached, in words; None if they can."""
    network = getattr(policy, "network", None)
    if not isinstance(network, nn.Module) or not getattr(network, "branches", ()):
        return "its network has no branches"
    if getattr(network, "_compiled_call_impl", None) is not None:
        return "a compiled network cannot be intercepted: use the back end 'eager'"
    return None


class CachedNetwork(nn.Module):
    """A network that computes each branch at its scheduled calls only. One object serves one sampling run.

    Args:
        network: A network with `branches` that takes a `hook`.
        steps: The calls at which each branch is computed.
    """

    def __init__(self, network: nn.Module, steps: Mapping[str, frozenset[int]]) -> None:
        super().__init__()
        self.network, self.steps = network, steps
        self.calls = 0
        self.stored: dict[str, Tensor] = {}
        self._batch: int | None = None

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the network, see there.

        Raises:
            ValueError: The batch has another size than in the call before.
        """
        if self._batch not in (None, x.shape[0]):
            raise ValueError(f"a block cache made for a batch of {self._batch} was called with {x.shape[0]} rows")
        self._batch = x.shape[0]
        out: Tensor = self.network(x, time, cond, self._hook)
        self.calls += 1
        return out

    def _hook(self, name: str, compute: Any) -> Tensor:
        if self.calls in self.steps[name]:
            self.stored[name] = compute()
        return self.stored[name]


class BlockCachePolicy(RealtimePolicy):
    """A policy that reuses branch outputs across the denoising steps of one call. Its state is the policy's own."""

    options: BlockCacheConfig

    def __init__(self, policy: Any, options: BlockCacheConfig) -> None:
        super().__init__(policy, options)
        reason = cacheable(policy)
        if reason is not None:
            raise DipoleError(f"method 'block-cache': {reason}")
        _check(policy, options)
        self._steps = {name: frozenset(steps) for name, steps in options.steps.items()}

    def with_sampler(self, sampler: SamplerConfig) -> Self:
        """Return itself for its own sampler.

        Raises:
            DipoleError: The schedule was made for another one.
        """
        if sampler == self.sampler:
            return self
        raise DipoleError("method 'block-cache': the schedule is for one sampler only: run `dipole accelerate` again")

    def initial_state(self, batch: int) -> State:
        """Return the state of the policy underneath: the cache is no part of it, it does not outlive a call."""
        state: State = self.policy.initial_state(batch)
        return state

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da], state)`; see `Policy.act`."""
        answer: tuple[Tensor, State] = self._fresh().act(obs, state, noise, generator)
        return answer

    def denoising_chain(self, obs: Observation, generator: Random = None) -> tuple[list[float], Tensor]:
        """Return the visited levels and the chunks there; see `DiffusionPolicy.denoising_chain`."""
        chain: tuple[list[float], Tensor] = self._fresh().denoising_chain(obs, generator)
        return chain

    def _fresh(self) -> Any:
        """Return the policy with an empty cache."""
        return with_network(self.policy, CachedNetwork(self.policy.network, self._steps))


def _check(policy: Any, config: BlockCacheConfig) -> None:
    where = "method 'block-cache'"
    if not config.steps:
        raise DipoleError(f"{where}: it needs a schedule: `dipole accelerate` finds one (option 'steps' is empty)")
    branches = tuple(policy.network.branches)
    if set(config.steps) != set(branches):
        odd = sorted(set(config.steps) ^ set(branches))[0]
        raise DipoleError(f"{where}: branch '{odd}' is not both in the schedule and in the network: calibrate again")
    for name, steps in config.steps.items():
        if 0 not in steps:
            raise DipoleError(f"{where}: branch '{name}' is not computed at step 0, so there is nothing to reuse")
    if config.levels != visited_levels(policy):
        raise DipoleError(f"{where}: the schedule is for another sampler ({len(config.levels) - 1} steps): calibrate")
    if config.weights != weights_digest(policy.network):
        raise DipoleError(f"{where}: the schedule was made for other weights: calibrate again")
