"""Diffusion Policy: normalise, encode, denoise a chunk of actions, denormalise.

Source: Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion" (RSS 2023); with any process,
prediction type, sampler and network of dipole. Chunk indexing: index To - 1 of the prediction is the action for now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dipole import networks
from dipole.data.normalizer import Normalizer
from dipole.diffusion import Denoiser, NetworkDenoiser, Process, sample
from dipole.diffusion.process_view import ProcessView
from dipole.diffusion.samplers import StepInfo, initial_noise
from dipole.diffusion.tensors import Random, expand
from dipole.errors import DipoleError
from dipole.policies.config import PolicyConfig, SamplerConfig
from dipole.policies.encoder import ObservationEncoder
from dipole.policies.policy import Observation, State, reset_rows


class DiffusionPolicy(nn.Module):
    """A policy that denoises action chunks.

    Attributes:
        config: Its configuration.
        normalizer: Statistics of every feature.
        encoder: Observations to conditioning.
        network: `network(x, time, cond)`.
        sampler: How it denoises at run time (starts as `config.sampler`).
    """

    config_class = PolicyConfig
    type_name = "diffusion"

    def __init__(self, config: PolicyConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.config = config
        self.normalizer = normalizer
        self.encoder = ObservationEncoder(config)
        self.network = networks.build(config.network, config.action_dim, config.pred_horizon, self.encoder.cond_dims)
        self.process = config.process.build()
        self.objective = config.objective.build(config.process)
        self.sampler = config.sampler
        for key in [*config.observation, "action"]:
            normalizer.affine(key)  # raises for a feature without statistics

    @staticmethod
    def from_lerobot(path: str | Path, revision: str | None = None, **options: Any) -> DiffusionPolicy:
        """Return LeRobot's diffusion policy: see `dipole.policies.lerobot.from_lerobot`."""
        from dipole.policies.lerobot import from_lerobot

        return from_lerobot(path, revision, **options)

    @property
    def obs_horizon(self) -> int:
        """Return To."""
        return self.config.obs_horizon

    @property
    def pred_horizon(self) -> int:
        """Return Tp."""
        return self.config.pred_horizon

    @property
    def action_horizon(self) -> int:
        """Return Ta."""
        return self.config.action_horizon

    @property
    def action_dim(self) -> int:
        """Return Da."""
        return self.config.action_dim

    @property
    def denoiser(self) -> NetworkDenoiser:
        """Return the denoiser of normalised action chunks, to wrap, guide or compose."""
        objective = self.config.objective
        return NetworkDenoiser(self.network, self.process, objective.prediction_type, objective.sigma_data)

    def with_sampler(self, sampler: SamplerConfig) -> DiffusionPolicy:
        """Return a policy with the same weights (shared, not copied) and another sampler."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def encode(self, obs: Observation, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the conditioning for raw observations `[B, To, ...]` (`generator`: for random crops in training)."""
        cond: dict[str, Tensor] = self.encoder(obs, self.normalizer, generator)
        return cond

    def loss(self, batch: dict[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the denoising loss of a batch of windows.

        Args:
            batch: Observations `[B, To, ...]`, `action` `[B, Tp, Da]`, `action_is_pad` `[B, Tp]`, raw.
            generator: Source of levels, noise and crops.
        """
        x0 = self.normalizer.normalize("action", batch["action"])
        mask = ~batch["action_is_pad"].unsqueeze(-1) if self.config.objective.mask_padding else None
        t = self._streaming_levels(x0, generator)
        return self.objective(self.network, x0, self.encode(batch, generator), generator=generator, mask=mask, t=t)

    def _streaming_levels(self, x0: Tensor, generator: Generator | None) -> Tensor | None:
        """Return a level per position `[B, Tp]` for a policy trained for streaming, else None."""
        if self.config.streaming is None:
            return None
        horizons = (self.obs_horizon, self.pred_horizon, self.action_horizon)
        levels = self.config.streaming.draw(len(x0), horizons, self.process, self.objective.time, generator)
        return levels.to(x0.device)

    # DistributedDataParallel synchronises gradients of what runs through `forward`.
    def forward(self, batch: dict[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return `loss(batch, generator)`."""
        return self.loss(batch, generator)

    def initial_state(self, batch: int) -> State:
        """Return an empty state: this policy remembers nothing."""
        return {}

    def reset(self, state: State, mask: Tensor) -> State:
        """Return the state with some rows reset."""
        return reset_rows(state, self.initial_state(len(mask)), mask)

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; see `Policy.act`."""
        self.check_observation(obs)
        x0 = self.denoise(self.encode(obs), noise, generator)
        first = self.obs_horizon - 1
        return self.normalizer.denormalize("action", x0[:, first : first + self.action_horizon]), state

    def denoise(
        self,
        cond: dict[str, Tensor],
        noise: Tensor | None = None,
        generator: Random = None,
        guide: Callable[[Denoiser, Process], Denoiser] | None = None,
        **options: Any,
    ) -> Tensor:
        """Return a whole denoised chunk `[B, Tp, Da]`, normalised.

        Args:
            cond: From `encode`.
            noise: Standard normal `[B, Tp, Da]`; None to draw it.
            generator: Source of randomness.
            guide: Called with the denoiser and the process it is sampled in; returns the denoiser to use instead.
            **options: Passed to `sample`, e.g. `callback`.
        """
        denoiser: Denoiser = self.denoiser
        process = self.process
        if self.sampler.process is not None:
            process = self.sampler.process.build()
            denoiser = ProcessView(denoiser, self.process, process)
        if guide is not None:
            denoiser = guide(denoiser, process)
        levels = self.sampler.levels(process)
        first = next(iter(cond.values()))
        shape = (first.shape[0], self.pred_horizon, self.action_dim)
        if noise is None:
            init = initial_noise(process, levels, shape, generator, like=first)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        else:
            init = noise * expand(process.prior_std(levels[0]), noise).to(noise)
        kernel = self.sampler.build()
        x0: Tensor = sample(denoiser, process, levels, kernel, cond=cond, init=init, generator=generator, **options)
        return x0

    @torch.no_grad()
    def denoising_chain(self, obs: Observation, generator: Random = None) -> tuple[list[float], Tensor]:
        """Return the visited levels and the chunks there, `[K+1, B, Tp, Da]`, in physical units: for pictures."""
        steps: list[StepInfo] = []
        final = self.denoise(self.encode(obs), generator=generator, callback=steps.append)
        chain = torch.stack([*(info.x for info in steps), final])
        return [*(float(info.t) for info in steps), float(steps[-1].s)], self.normalizer.denormalize("action", chain)

    def check_observation(self, obs: Observation) -> None:
        """Raise DipoleError when a feature is missing or has another shape than in training."""
        for key, feature in self.config.observation.items():
            if key not in obs:
                raise DipoleError(
                    f"observation lacks '{key}', which the policy was trained on; it has: {', '.join(obs)}"
                )
            value = obs[key]
            if value.dim() != len(feature.shape) + 2 or value.shape[1] != self.obs_horizon:
                raise DipoleError(
                    f"observation '{key}' has shape {list(value.shape)}, expected [B, To={self.obs_horizon}, "
                    f"{', '.join(str(n) for n in feature.shape)}]"
                )
