"""What the methods share: a wrapper that stands for the policy inside it, and randomness row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dipole.diffusion import Denoiser, Process
from dipole.diffusion.tensors import Random
from dipole.errors import DipoleError
from dipole.policies.common import Forwarding
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State

_NEEDED = ("encode", "denoise", "denoiser", "process", "sampler", "normalizer", "with_sampler", "check_observation")


class RealtimePolicy(Forwarding, nn.Module):
    """A trained policy run by a method. Methods are subclasses with `initial_state` and `act`.

    Attributes:
        policy: The policy that was trained; its weights are shared.
        options: The method's configuration.
    """

    def __init__(self, policy: Any, options: Any) -> None:
        super().__init__()
        missing = [name for name in _NEEDED if not hasattr(policy, name)]
        if missing:
            kind = getattr(policy, "type_name", type(policy).__name__)
            raise DipoleError(
                f"{type(self).__name__} works on policies that denoise chunks of actions, not on one of kind '{kind}' "
                f"(it has no '{missing[0]}'): run it with the method 'plain'"
            )
        self.policy = policy
        self.options = options

    @property
    def inner(self) -> Any:
        """Return the policy that was trained."""
        return self.policy

    @property
    def config(self) -> Any:
        """Return the configuration of the policy."""
        return self.policy.config

    @property
    def type_name(self) -> str:
        """Return the kind of the policy."""
        return str(self.policy.type_name)

    @property
    def network(self) -> nn.Module:
        """Return the denoising network."""
        network: nn.Module = self.policy.network
        return network

    @property
    def process(self) -> Process:
        """Return the forward process."""
        process: Process = self.policy.process
        return process

    @property
    def denoiser(self) -> Denoiser:
        """Return the denoiser of normalised chunks."""
        denoiser: Denoiser = self.policy.denoiser
        return denoiser

    @property
    def sampler(self) -> SamplerConfig:
        """Return how the policy denoises where the method does not say otherwise."""
        sampler: SamplerConfig = self.policy.sampler
        return sampler

    def with_sampler(self, sampler: SamplerConfig) -> Self:
        """Return the same method over the policy with another sampler (weights shared)."""
        other = type(self)(self.policy.with_sampler(sampler), self.options).train(self.training)
        runtime: Any = self.__dict__.get("runtime")
        if runtime is not None:
            other.__dict__["runtime"] = replace(runtime, sampler=sampler)
        return other

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes."""
        raise TypeError(f"{type(self).__name__} does not say what it remembers")

    def encode(self, obs: Observation) -> dict[str, Tensor]:
        """Return the conditioning for raw observations, checked."""
        self.policy.check_observation(obs)
        cond: dict[str, Tensor] = self.policy.encode(obs)
        return cond

    def _empty_chunks(self, batch: int) -> Tensor:
        like = self.normalizer.affine("action")[0]  # a packed network has no parameters to ask
        return torch.zeros(batch, self.pred_horizon, self.action_dim, dtype=like.dtype, device=like.device)

    def _no_rows(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.bool, device=self.normalizer.affine("action")[0].device)


def for_rows(generator: Random, rows: Tensor) -> Random:
    """Return generators of which only those of some rows are the given ones; the others are spares, thrown away.

    A method that computes all rows, so that every row is rounded the same in every batch, but uses only some, must not
    advance the generators of the rest. One generator for all rows, or None, is returned as it is.

    Args:
        generator: As for `Policy.act`.
        rows: Which rows count, bool `[B]`.
    """
    if not isinstance(generator, Sequence):
        return generator
    return [g if own else torch.Generator(g.device) for g, own in zip(generator, rows.tolist(), strict=True)]


def rows_of(mask: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Return `value` in the rows where `mask` `[B]` is true and `other` elsewhere."""
    return torch.where(mask.reshape(-1, *[1] * (value.dim() - 1)), value, other)


def shifted(chunk: Tensor, by: int) -> Tensor:
    """Return a chunk `[B, Tp, D]` seen `by` env steps later; the last action is repeated at the end."""
    if by == 0:
        return chunk
    tail = chunk[:, -1:].expand(-1, min(by, chunk.shape[1]), -1)
    return torch.cat([chunk[:, by:], tail], dim=1)
