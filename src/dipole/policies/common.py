"""What the policies share, as mixins beside `nn.Module`: horizons, the check of observations, and denoising a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dipole.data.normalizer import Normalizer
from dipole.diffusion import Denoiser, Process, sample
from dipole.diffusion.samplers import initial_noise
from dipole.diffusion.tensors import Random, expand
from dipole.errors import DipoleError
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State, reset_rows


class Chunked:
    """Which actions of a chunk are due, and no memory; a policy that differs says so."""

    def initial_state(self, batch: int) -> State:
        """Return an empty state: this policy remembers nothing."""
        return {}

    def reset(self, state: State, mask: Tensor) -> State:
        """Return the state with the rows where `mask` (`[B]`, bool) is true at the start of an episode."""
        return reset_rows(state, self.initial_state(len(mask)), mask)

    def executed(self: Any, x0: Tensor) -> Tensor:
        """Return the actions of a normalised chunk `[B, Tp, Da]` that are due: `[B, Ta, Da]`, physical units."""
        first = self.obs_horizon - 1
        chunk: Tensor = self.normalizer.denormalize("action", x0[:, first : first + self.action_horizon])
        return chunk


class Configured(Chunked):
    """Horizons as `self.config` has them; a policy that differs says so."""

    config: Any

    @property
    def obs_horizon(self) -> int:
        """Return To."""
        return int(self.config.obs_horizon)

    @property
    def pred_horizon(self) -> int:
        """Return Tp."""
        return int(self.config.pred_horizon)

    @property
    def action_horizon(self) -> int:
        """Return Ta."""
        return int(self.config.action_horizon)

    @property
    def action_dim(self) -> int:
        """Return Da."""
        return int(self.config.action.shape[0])

    def check_observation(self, obs: Observation) -> None:
        """Raise DipoleError when a feature is missing or has another shape than in training (pictures: any size)."""
        for key, feature in self.config.observation.items():
            if key not in obs:
                raise DipoleError(
                    f"observation lacks '{key}', which the policy was trained on; it has: {', '.join(obs)}"
                )
            shape = tuple(obs[key].shape)
            same = len(shape) == len(feature.shape) + 2 if feature.is_image else shape[2:] == feature.shape
            if not same or shape[1] != self.obs_horizon:
                raise DipoleError(
                    f"observation '{key}' has shape {list(shape)}, expected [B, To={self.obs_horizon}, "
                    f"{', '.join(str(n) for n in feature.shape)}]"
                )


class Forwarding(Chunked):
    """Horizons and statistics of the policy within, for a policy that is made of another one."""

    @property
    def inner(self) -> Any:
        """Return the policy within."""
        raise TypeError(f"{type(self).__name__} does not say which policy is within")

    @property
    def obs_horizon(self) -> int:
        """Return To."""
        return int(self.inner.obs_horizon)

    @property
    def pred_horizon(self) -> int:
        """Return Tp."""
        return int(self.inner.pred_horizon)

    @property
    def action_horizon(self) -> int:
        """Return Ta."""
        return int(self.inner.action_horizon)

    @property
    def action_dim(self) -> int:
        """Return Da."""
        return int(self.inner.action_dim)

    @property
    def normalizer(self) -> Normalizer:
        """Return the statistics of every feature."""
        normalizer: Normalizer = self.inner.normalizer
        return normalizer


class Denoising(Configured):
    """Acts by denoising a chunk of which the actions from now on are executed.

    Attributes:
        run_sampler: What makes the steps: `sample`, or what the back end `whole-chunk` put in its place.
    """

    run_sampler: Callable[..., Tensor] = staticmethod(sample)
    sampler: SamplerConfig
    encode: Callable[[Observation], dict[str, Tensor]]

    def denoiser_and_process(self) -> tuple[Denoiser, Process]:
        """Return what denoises normalised chunks, and the process in which the sampler does so."""
        raise TypeError(f"{type(self).__name__} does not say what denoises")

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; see `Policy.act`."""
        self.check_observation(obs)
        return self.executed(self.denoise(self.encode(obs), noise, generator)), state

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
        denoiser, process = self.denoiser_and_process()
        if guide is not None:
            denoiser = guide(denoiser, process)
        levels = self.sampler.levels(process)
        first = next(iter(cond.values()))
        shape = (first.shape[0], self.pred_horizon, self.action_dim)
        init = starting_point(process, levels, shape, noise, generator, first)
        kernel = self.sampler.build()
        return self.run_sampler(denoiser, process, levels, kernel, cond=cond, init=init, generator=generator, **options)


def starting_point(
    process: Process, levels: Tensor, shape: tuple[int, ...], noise: Tensor | None, generator: Random, like: Tensor
) -> Tensor:
    """Return what denoising starts from, `shape`: noise as wide as the first level has it.

    Args:
        process: The process sampled in.
        levels: The levels visited.
        shape: `(B, Tp, Da)`.
        noise: Standard normal, of that shape; None to draw it.
        generator: Source of randomness.
        like: Tensor that gives dtype and device of what is drawn.

    Raises:
        ValueError: The noise has another shape.
    """
    if noise is None:
        drawn: Tensor = initial_noise(process, levels, shape, generator, like=like)  # type: ignore[assignment]
        return drawn
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
    return noise * expand(process.prior_std(levels[0]), noise).to(noise)
