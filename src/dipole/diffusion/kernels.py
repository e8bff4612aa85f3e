"""Transition kernels: one denoising step from level t to level s as a Normal. Sampler and scorer share them.

Every kernel is linear in the current sample and the denoised one,

    mean = c_x x + c_x0 clip(x0_hat) + c_raw x0_hat,      std = c_std,

with coefficients that depend on the two levels alone. `x0_hat` comes from the denoiser unclipped; `clip` bounds it
where the published samplers do. Where s == t a sample stays as it is (pinned parts, finished positions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dipole.diffusion.process import Flow, LevelLike, Process
from dipole.diffusion.tensors import Random, expand, map_parts, randn

Reduce = Literal["sum", "mean", "none"]


@dataclass(frozen=True)
class Normal:
    """The distribution of the next sample: independent normals.

    Attributes:
        mean: `[B, ...]`.
        std: A number, or a tensor that broadcasts against `mean`; 0 where the step is deterministic.
    """

    mean: Tensor
    std: Tensor | float

    @property
    def deterministic(self) -> bool:
        """Whether the standard deviation is 0 everywhere."""
        if isinstance(self.std, Tensor):
            return not bool((self.std > 0).any())
        return self.std <= 0

    def sample(self, generator: Random = None, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise, shaped as `mean`. No noise is drawn when the step is deterministic."""
        if self.deterministic:
            return self.mean
        if noise is None:
            noise = randn(tuple(self.mean.shape), generator, like=self.mean)
        if not isinstance(self.std, Tensor):
            return torch.add(self.mean, noise, alpha=self.std)
        return self.mean + self.std * noise

    def log_prob(self, value: Tensor, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
        """Return the log-density of `value`.

        Args:
            value: `[B, ...]`, shaped as `mean`.
            reduce: `sum` or `mean` over everything but the batch (`[B]`), or `none` (shaped as `mean`). Clip ranges
                of policy-gradient objectives differ by the number of dimensions between the two, so there is no default.
            mask: Entries that count, broadcastable to `mean`; the others (pinned parts, finished positions) give 0.

        Raises:
            ValueError: The step is deterministic at an entry that counts, so that it has no density.
        """
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device).expand_as(self.mean)
        counts = torch.ones_like(self.mean, dtype=torch.bool) if mask is None else mask.expand_as(self.mean).bool()
        if bool(((std <= 0) & counts).any()):
            raise ValueError(
                "this denoising step is deterministic (std 0), it has no log-probability: sample with a stochastic "
                "kernel (DDPM, DDIM with eta > 0, FlowSDE, CPS), or leave the last step out of the score"
            )
        safe = torch.where(counts, std, torch.ones_like(std))
        log_prob = -0.5 * ((value - self.mean) / safe) ** 2 - torch.log(safe) - 0.5 * math.log(2 * math.pi)
        log_prob = torch.where(counts, log_prob, torch.zeros_like(log_prob))
        if reduce == "none":
            return log_prob
        if reduce == "sum":
            return log_prob.flatten(1).sum(1)
        if reduce == "mean":
            return log_prob.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)
        raise ValueError(f"unknown reduce '{reduce}': sum, mean or none")


class Coefficients(NamedTuple):
    """Coefficients of one step, shaped as the level (float64 tensors), or plain numbers."""

    x: Any
    x0: Any
    raw: Any
    std: Any


def _levels(process: Process, t: LevelLike, s: LevelLike) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)


def _noise_coefficients(alpha: Tensor, sigma: Tensor, signal: Tensor, noise: Tensor, std: Tensor) -> Coefficients:
    """Return the coefficients of  mean = signal x0 + noise eps  with eps = (x - alpha x0) / sigma of the raw x0."""
    return Coefficients(noise / sigma, signal, -noise * alpha / sigma, std)


def _ancestral_std(alpha: Tensor, sigma: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Return the standard deviation of q(x_s | x_t, x0), the forward chain's posterior."""
    variance = (sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2).clamp(min=0)
    return sigma_s / sigma * variance.sqrt()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Base of all kernels: subclasses give the coefficients; the step itself is written once, here.

    Attributes:
        clip: Bound |x0_hat| <= clip where the sample is pulled towards x0_hat (DDPM's `clip_sample`); None for none.
    """

    clip: float | None = None

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        raise TypeError(f"{type(self).__name__} is abstract: use DDPM, DDIM, FlowSDE, CPS or ConsistencyRenoise")

    def coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        """Return the coefficients of the step from level `t` to `s`, shaped as those, float64."""
        t, s = torch.as_tensor(t), torch.as_tensor(s)
        stay = t == s
        value = self._coefficients(process, t, s)
        identity = (1.0, 0.0, 0.0, 0.0)
        # At s == t == clean the formulas divide 0 by 0; `where` discards those entries.
        return Coefficients(*(torch.where(stay, i, c.double()) for i, c in zip(identity, value, strict=True)))

    def combine(self, x: Tensor, x0_hat: Tensor, c: Coefficients) -> Normal:
        """Return the Normal of the next sample from coefficients that are numbers or already broadcast against `x`."""
        raw = c.raw
        if self.clip is None:
            pulled, raw, c_x0 = x0_hat, None, c.x0 + c.raw
        else:
            pulled, c_x0 = x0_hat.clamp(-self.clip, self.clip), c.x0
            raw = raw if isinstance(raw, Tensor) or raw else None
        if isinstance(c.x, Tensor):
            mean = c.x * x + c_x0 * pulled
            mean = mean if raw is None else mean + raw * x0_hat
        else:
            mean = torch.add(x * c.x, pulled, alpha=c_x0)
            mean = mean if raw is None else mean.add_(x0_hat, alpha=raw)
        return Normal(mean, c.std)

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
        value = self.coefficients(process, t, s)
        return self.combine(x, x0_hat, Coefficients(*(expand(c, x).to(x) for c in value)))


@dataclass(frozen=True, kw_only=True)
class DDPM(Kernel):
    """The forward chain's posterior q(x_s | x_t, x0_hat) (Ho et al. 2020, eq. 6-7), for neighbouring or skipped levels.

    Attributes:
        variance: `fixed_small`: the posterior's own variance; `fixed_large`: the forward step's.
    """

    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, sigma, alpha_s, sigma_s = _levels(process, t, s)
        forward = alpha / alpha_s
        forward_variance = (sigma**2 - forward**2 * sigma_s**2).clamp(min=0)
        std = _ancestral_std(alpha, sigma, alpha_s, sigma_s)
        if self.variance == "fixed_large":
            std = torch.where(sigma_s > 0, forward_variance.sqrt(), torch.zeros_like(std))
        x = forward * sigma_s**2 / sigma**2
        return Coefficients(x, alpha_s * forward_variance / sigma**2, torch.zeros_like(x), std)


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

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, sigma, alpha_s, sigma_s = _levels(process, t, s)
        std = self.eta * _ancestral_std(alpha, sigma, alpha_s, sigma_s)
        noise = (sigma_s**2 - std**2).clamp(min=0).sqrt()
        value = _noise_coefficients(alpha, sigma, alpha_s, noise, std)
        if self.epsilon_from == "clipped":
            value = Coefficients(value.x, value.x0 + value.raw, torch.zeros_like(value.raw), value.std)
        return value


@dataclass(frozen=True, kw_only=True)
class FlowSDE(Kernel):
    """Stochastic step of a flow with the ODE's marginals (Flow-GRPO 2025, eq. 9; spec e 0.2). `Flow` process only.

    sigma_t = eta sqrt(t / (1 - t)) (`noise="sqrt"`; at t = 1 the next level stands in the denominator), or eta
    (`noise="constant"`);  mean = x + (v - sigma_t^2 score / 2) dt,  std = sigma_t sqrt(-dt),  dt = s - t.
    Its marginals are exact only as dt -> 0.

    Attributes:
        eta: Amount of noise.
        noise: How the noise depends on the level.
    """

    eta: float = 0.7
    noise: Literal["sqrt", "constant"] = "sqrt"

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        if not isinstance(process, Flow):
            raise ValueError(f"FlowSDE needs a Flow process, not {type(process).__name__}: use DDIM(eta) or CPS there")
        t, s = torch.as_tensor(t).double(), torch.as_tensor(s).double()
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

    Attributes:
        eta: Share of the noise that is fresh, in [0, 1].
    """

    eta: float = 0.7

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha, sigma, alpha_s, sigma_s = _levels(process, t, s)
        std = sigma_s * math.sin(self.eta * math.pi / 2)
        return _noise_coefficients(alpha, sigma, alpha_s, (sigma_s**2 - std**2).clamp(min=0).sqrt(), std)


@dataclass(frozen=True, kw_only=True)
class ConsistencyRenoise(Kernel):
    """Multistep consistency sampling: jump to x0_hat, then renoise to level s (Song et al. 2023, algorithm 1)."""

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        zero = torch.zeros_like(alpha_s)
        return Coefficients(zero, alpha_s, zero, sigma_s)


def log_prob(dist: Normal | Mapping[str, Normal], value: Any, reduce: Reduce) -> Tensor:
    """Return the log-density of a step: that of a Normal, or the sum over parts of each one's (`reduce` within a part)."""
    if isinstance(dist, Normal):
        return dist.log_prob(value, reduce)
    if reduce == "none":
        raise ValueError("reduce='none' has no meaning over parts of different shapes: use sum or mean")
    return torch.stack([part.log_prob(value[key], reduce) for key, part in dist.items()]).sum(0)
