"""A policy whose first denoising steps are taken by one network and whose last ones by another (fine-tuned) one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion import sample
from dipole.diffusion.denoiser import Denoiser
from dipole.diffusion.process_view import ProcessView
from dipole.diffusion.tensors import Random
from dipole.policies.common import starting_point
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.rl.wrapped import WrappedConfig, Wrapping, base_values


@dataclass(frozen=True)
class StagedConfig(WrappedConfig):
    """A staged policy.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
        boundary: At levels up to this one (of the process sampled in) the tuned network is asked.
        sampler: How to denoise.
    """

    boundary: float
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True)
class StagedDenoiser:
    """One denoiser above a level, another at it and below (plain numbers as levels only)."""

    early: Denoiser
    late: Denoiser
    boundary: float

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat."""
        # The boundary is one of the sampler's levels; half a millionth forgives its journey through JSON.
        return (self.late if float(t) <= self.boundary * (1 + 5e-7) else self.early)(x, t, cond)


class StagedPolicy(Wrapping):
    """The policy; see `Policy`."""

    config_class = StagedConfig
    type_name = "staged"
    config: StagedConfig

    def __init__(self, config: StagedConfig, normalizer: Normalizer) -> None:
        super().__init__(config, normalizer)
        self.network: nn.Module = copy.deepcopy(self.base.network)

    @classmethod
    def of(cls, base: Any, tuned: nn.Module, boundary: float, sampler: SamplerConfig) -> StagedPolicy:
        """Return the policy of a base and a tuned network, shared and not copied."""
        config = StagedConfig(**base_values(base), boundary=boundary, sampler=sampler)
        return cls.sharing(base, config, network=tuned)

    @property
    def process(self) -> Any:
        """Return the process."""
        return self.base.process

    def encode(self, obs: Observation, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the conditioning."""
        cond: dict[str, Tensor] = self.base.encode(obs, generator)
        return cond

    @property
    def denoiser(self) -> Denoiser:
        """Return the denoiser that changes networks at the boundary."""
        return self._denoiser(self.process)

    def _denoiser(self, process: Any) -> Denoiser:
        """Return it as seen in another process: the boundary is a level of the process sampled in."""
        early = self.base.denoiser
        late = replace(early, network=self.network)
        if process is not self.process:
            early, late = (ProcessView(part, self.process, process) for part in (early, late))
        return StagedDenoiser(early, late, self.config.boundary)

    def denoise(
        self, cond: dict[str, Tensor], noise: Tensor | None = None, generator: Random = None, **options: Any
    ) -> Tensor:
        """Return a whole chunk `[B, Tp, Da]`, normalised; see `DiffusionPolicy.denoise`."""
        chosen = self.sampler.process
        process = self.process if chosen is None else chosen.build()
        denoiser = self._denoiser(process)
        levels = self.sampler.levels(process)
        first = next(iter(cond.values()))
        shape = (first.shape[0], self.pred_horizon, self.action_dim)
        init = starting_point(process, levels, shape, noise, generator, first)
        kernel = self.sampler.build()
        x0: Tensor = sample(denoiser, process, levels, kernel, cond=cond, init=init, generator=generator, **options)
        return x0

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`."""
        return self.executed(self.denoise(self.encode(obs), noise, generator)), state
