"""Transition kernels: one denoising step from level t to level s as a Normal. Sampler and scorer share them.

Every kernel is linear in the current sample and the denoised one,

    mean = c_x x + c_x0 clip(x0_hat) + c_raw x0_hat,      std = c_std,

with coefficients that depend on the two levels alone. `x0_hat` comes from the denoiser unclipped; `clip` bounds it
where the published samplers do. Where s == t a sample stays as it is (pinned parts, finished positions).
Coefficients are computed in float64 and remembered for levels that are plain numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dipole.diffusion.normal import Normal, Reduce, log_prob
from dipole.diffusion.process import VP, Flow, LevelLike, Process
from dipole.diffusion.process.base import as_level
from dipole.diffusion.tensors import expand, map_parts, scaled, weighted_sum

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "Coefficients",
    "ConsistencyRenoise",
    "FlowSDE",
    "Kernel",
    "Normal",
    "Reduce",
    "check_steps",
    "coefficient_table",
    "log_prob",
]


class Coefficients(NamedTuple):
    """Coefficients of one step, shaped as the level (float64 tensors), or plain numbers. `raw` is 0 without a clip."""

    x: Any
    x0: Any
    raw: Any
    std: Any


def _levels(process: Process, t: LevelLike, s: LevelLike) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)


def _noise_coefficients(alpha: Tensor, sigma: Tensor, signal: Tensor, noise: Tensor, std: Tensor) -> Coefficients:
    """Return the coefficients of  mean = signal x0 + noise eps  with eps = (x - alpha x0) / sigma of the raw x0."""
    return Coefficients(noise / sigma, signal, -noise * alpha / sigma, std)


def _variances(process: Process, t: LevelLike, s: LevelLike) -> tuple[Tensor, Tensor, Tensor]:
    """Return the variances of q(x_t | x_0), q(x_s | x_0) and q(x_t | x_s)."""
    if isinstance(process, VP):  # from its own table: exact there, and rounded as it is
        of_t, of_s, forward = process.variances(t, s)
    else:
        alpha, sigma, alpha_s, sigma_s = _levels(process, t, s)
        of_t, of_s = sigma**2, sigma_s**2
        forward = of_t - (alpha / alpha_s) ** 2 * of_s
    return of_t, of_s, forward.clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Kernel(ABC):
    """Base of all kernels: subclasses give the coefficients; the step itself is written once, here.

    Attributes:
        clip: Bound |x0_hat| <= clip where the sample is pulled towards x0_hat (DDPM's `clip_sample`); None for none.
    """

    clip: float | None = None

    @property
    def rises(self) -> bool:
        """Whether the kernel also goes from a level to a noisier one (DDIM inversion, renoising)."""
        return False

    @abstractmethod
    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients: ...

    def coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        """Return the coefficients of the step from level `t` to `s`, shaped as those, float64."""
        t, s = as_level(t), as_level(s)
        value = self._coefficients(process, t, s)
        if self.clip is None:
            value = value._replace(x0=value.x0 + value.raw, raw=torch.zeros_like(value.raw))
        identity = (1.0, 0.0, 0.0, 0.0)
        # At s == t == clean the formulas divide 0 by 0; `where` discards those entries.
        return Coefficients(*(torch.where(t == s, i, c) for i, c in zip(identity, value, strict=True)))

    def combine(self, x: Tensor, x0_hat: Tensor, c: Coefficients) -> Normal:
        """Return the Normal of the next sample from coefficients that are numbers or already broadcast against `x`."""
        if self.clip is None:
            return Normal(weighted_sum(c.x, x, c.x0, x0_hat), c.std)
        mean = weighted_sum(c.x, x, c.x0, x0_hat.clamp(-self.clip, self.clip))
        return Normal(mean + scaled(x0_hat, c.raw) if self._uses_raw(c) else mean, c.std)

    def _uses_raw(self, c: Coefficients) -> bool:
        return isinstance(c.raw, Tensor) or c.raw != 0

    def step(self, x: Any, x0_hat: Any, t: Any, s: Any, process: Any) -> Any:
        """Return the distribution of the sample at level `s` given `x` at level `t`.

        Args:
            x: `[B, ...]`, or parts.
            x0_hat: The denoiser's output, shaped as `x`.
            t: Level of `x`: a number, `[B]` or `[B, T]`, or one per part.
            s: Level to go to, like `t`.
            process: The process, or one per part.

        Returns:
            A `Normal`, or a dict of them with the parts of `x`.
        """
        return map_parts(self._step, x, x0_hat, t, s, process)

    def _step(self, x: Tensor, x0_hat: Tensor, t: LevelLike, s: LevelLike, process: Process) -> Normal:
        if isinstance(t, Tensor) or isinstance(s, Tensor):
            value = self.coefficients(process, t, s)
            return self.combine(x, x0_hat, Coefficients(*(expand(c, x).to(x) for c in value)))
        return self.combine(x, x0_hat, coefficient_table(self, process, (float(t), float(s)))[0])


@lru_cache(maxsize=4096)
def coefficient_table(kernel: Kernel, process: Process, levels: tuple[float, ...]) -> tuple[Coefficients, ...]:
    """Return the coefficients of every step along a list of levels, as numbers, remembered.

    Raises:
        ValueError: The kernel cannot make one of the steps.
    """
    visited = torch.tensor(levels, dtype=torch.float64)
    value = kernel.coefficients(process, visited[:-1], visited[1:])
    check_steps(kernel, visited, value)
    return tuple(Coefficients(*row) for row in torch.stack(list(value)).T.tolist())


def check_steps(kernel: Kernel, levels: Tensor, value: Coefficients) -> None:
    """Raise ValueError when `kernel` cannot make a step along `levels` `[K+1, ...]` (coefficients `[K, ...]`)."""
    if not kernel.rises and bool((levels[1:] > levels[:-1]).any()):
        raise ValueError(f"{kernel} cannot go to a noisier level: levels must not increase")
    if not bool(torch.isfinite(torch.stack(list(value))).all()):
        raise ValueError(f"{kernel} cannot make every step of these levels: it would divide by 0")


@dataclass(frozen=True, kw_only=True)
class DDPM(Kernel):
    """The forward chain's posterior q(x_s | x_t, x0_hat) (Ho et al. 2020, eq. 6-7), for neighbouring or skipped levels.

    Attributes:
        variance: `fixed_small`: the posterior's own variance; `fixed_large`: the forward step's.
    """

    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, alpha_s = process.alpha(t), process.alpha(s)
        variance, variance_s, forward = _variances(process, t, s)
        std = (variance_s / variance * forward).sqrt()
        if self.variance == "fixed_large":
            std = torch.where(variance_s > 0, forward.sqrt(), torch.zeros_like(std))
        x = alpha / alpha_s * (variance_s / variance)
        return Coefficients(x, alpha_s * (forward / variance), torch.zeros_like(x), std.double())


@dataclass(frozen=True, kw_only=True)
class DDIM(Kernel):
    """Non-Markovian step with adjustable noise (Song et al. 2021, eq. 12), in any process.

    `eta=0` is deterministic and equals an Euler step of the probability-flow ODE: in `Flow` x + (s - t) velocity, in
    `EDM` x + (s - t)(x - x0)/t. `eta=1` is the ancestral step (in `EDM`: Euler-ancestral).

    Attributes:
        eta: Share of the ancestral noise.
        epsilon_from: With `clip`: whether eps is that of the unclipped x0_hat (as diffusers and LeRobot do) or of the
            clipped one.
    """

    eta: float = 0.0
    epsilon_from: Literal["raw", "clipped"] = "raw"

    @property
    def rises(self) -> bool:
        """Whether eta is 0: then a rising list of levels is DDIM inversion."""
        return self.eta == 0

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, sigma, alpha_s, _ = _levels(process, t, s)
        variance, variance_s, forward = _variances(process, t, s)
        std = self.eta * (variance_s / variance * forward).sqrt()
        noise = (variance_s - std**2).clamp(min=0).sqrt()
        value = _noise_coefficients(alpha, sigma, alpha_s, noise, std.double())
        if self.epsilon_from == "clipped":
            value = Coefficients(value.x, value.x0 + value.raw, torch.zeros_like(value.raw), value.std)
        return value


@dataclass(frozen=True, kw_only=True)
class FlowSDE(Kernel):
    """Stochastic step of a flow with the ODE's marginals (Flow-GRPO 2025, eq. 9; spec e 0.2). `Flow` process only.

    sigma_t = eta sqrt(t / (1 - t)) (`noise="sqrt"`; at t = 1 the next level stands in the denominator), or eta
    (`noise="constant"`);  mean = x + (v - sigma_t^2 score / 2) dt,  std = sigma_t sqrt(-dt),  dt = s - t.
    Its marginals are exact only as dt -> 0; with `sqrt` slowly so from t = 1, where the noise has a pole.

    Attributes:
        eta: Amount of noise.
        noise: How the noise depends on the level.
    """

    eta: float = 0.7
    noise: Literal["sqrt", "constant"] = "sqrt"

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        if not isinstance(process, Flow):
            raise ValueError(f"FlowSDE needs a Flow process, not {type(process).__name__}: use DDIM(eta) or CPS there")
        t, s = as_level(t), as_level(s)
        dt = s - t
        if self.noise == "sqrt":
            diffusion = self.eta * torch.sqrt(t / (1 - torch.where(t >= 1, s, t)))
        else:
            diffusion = torch.full_like(t, self.eta)
        half = diffusion**2 / (2 * t)
        # v = (x - x0) / t, and the score is -(x + (1 - t) v) / t
        velocity = (1 + half * (1 - t)) * dt / t
        x = 1 + half * dt + velocity
        return Coefficients(x, -velocity, torch.zeros_like(x), diffusion * torch.sqrt((-dt).clamp(min=0)))


@dataclass(frozen=True, kw_only=True)
class CPS(Kernel):
    """Coefficients-preserving sampling: the noise coefficient at level s is exact at any step size (spec e 0.2).

    std = sigma(s) sin(eta pi/2),  mean = alpha(s) x0 + sqrt(sigma(s)^2 - std^2) eps.

    The share of fresh noise is the same in every step, however small: at fixed eta more steps do not bring the ODE's
    marginals (spread data is drawn together); they do when eta falls as 1 / sqrt(steps).

    Attributes:
        eta: Share of the noise that is fresh, in [0, 1].
    """

    eta: float = 0.7

    @property
    def rises(self) -> bool:
        """True."""
        return True

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, sigma, alpha_s, sigma_s = _levels(process, t, s)
        std = sigma_s * math.sin(self.eta * math.pi / 2)
        return _noise_coefficients(alpha, sigma, alpha_s, (sigma_s**2 - std**2).clamp(min=0).sqrt(), std)


@dataclass(frozen=True, kw_only=True)
class ConsistencyRenoise(Kernel):
    """Multistep consistency sampling: jump to x0_hat, then renoise to level s (Song et al. 2023, algorithm 1)."""

    @property
    def rises(self) -> bool:
        """True."""
        return True

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        zero = torch.zeros_like(alpha_s)
        return Coefficients(zero, alpha_s, zero, sigma_s)
