"""Deterministic solvers of the probability-flow ODE beyond one Euler step, and Heun with churn.

A solver advances a sample from one level to the next and may call the denoiser more than once (Heun, DPM-2,
DPM-Solver++ 2S) or remember its previous output (DPM-Solver++ 2M). Unlike a kernel it has no density.
All work in the process's ODE view  y = scale x,  dy/du = (y - x0_hat) / u  (`Process.ode_view`): sigma for `EDM` and
`VP`, t for `Flow`. Levels must be the same for every row and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dipole.diffusion.process import Process
from dipole.diffusion.tensors import Random, randn

Denoise = Callable[[Tensor, float], Tensor]


class Solver(Protocol):
    """One way to advance a sample; stateless: what it remembers from step to step goes in and out as `memory`."""

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return `(x at level s, x0_hat at level t, memory for the next step)`; `memory` is None at the first step."""


def _view(process: Process, t: float) -> tuple[float, float]:
    scale, u = process.ode_view(t)
    return float(scale), float(u)


def _level_between(process: Process, u_from: float, u_to: float) -> tuple[float, float]:
    """Return the level at the geometric mean of two ODE times, and that time."""
    u = math.sqrt(u_from * u_to)
    ratio = u / (1 - u) if abs(float(process.alpha(process.noisiest))) == 0.0 else u
    return float(process.level_at(ratio)), u


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method, with optional churn (Karras et al. 2022, algorithms 1 and 2).

    2n - 1 network calls for n steps: the last step is Euler's. Churn needs an `EDM` process.

    Attributes:
        churn: S_churn: noise added before each step; 0 is deterministic.
        churn_min: S_tmin, and `churn_max` S_tmax: levels between which noise is added.
        churn_max: See `churn_min`.
        churn_noise: S_noise: factor on the added noise.
        num_steps: Number of steps of the whole run, which Karras divides the churn by; needed with churn.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = float("inf")
    churn_noise: float = 1.0
    num_steps: int | None = None

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one step of Heun's method."""
        if self.churn > 0 and self.churn_min <= t <= self.churn_max:
            x, t = self._add_churn(x, t, process, generator)
        (scale, u), (scale_s, u_s) = _view(process, t), _view(process, s)
        x0 = denoise(x, t)
        y = x * scale
        slope = (y - x0) / u
        y_next = y + (u_s - u) * slope
        if u_s > 0:
            slope_next = (y_next - denoise(y_next / scale_s, s)) / u_s
            y_next = y + (u_s - u) * (slope + slope_next) / 2
        return y_next / scale_s, x0, None

    def _add_churn(self, x: Tensor, t: float, process: Process, generator: Random) -> tuple[Tensor, float]:
        if self.num_steps is None:
            raise ValueError("Heun with churn needs num_steps, the number of steps of the whole run")
        if float(process.alpha(t)) != 1.0:
            raise ValueError("churn is defined for an EDM process only")
        t_up = t * (1 + min(self.churn / self.num_steps, math.sqrt(2) - 1))
        noise = randn(tuple(x.shape), generator, like=x)
        return x + noise * (self.churn_noise * math.sqrt(t_up**2 - t**2)), t_up


@dataclass(frozen=True)
class DPM2:
    """Midpoint method in log noise (DPM-Solver-2 as in Karras et al. 2022, appendix). 2n - 1 calls for n steps."""

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one midpoint step; Euler's to the clean level."""
        (scale, u), (scale_s, u_s) = _view(process, t), _view(process, s)
        x0 = denoise(x, t)
        y = x * scale
        slope = (y - x0) / u
        if u_s > 0:
            middle, u_middle = _level_between(process, u, u_s)
            scale_middle, u_middle = _view(process, middle)
            y_middle = y + (u_middle - u) * slope
            slope = (y_middle - denoise(y_middle / scale_middle, middle)) / u_middle
        return (y + (u_s - u) * slope) / scale_s, x0, None


def _log_snr_view(process: Process, t: float) -> tuple[float, float, float]:
    """Return `(alpha, sigma, lambda = log(alpha / sigma))`; lambda is infinite at the clean level, -infinite at pure noise."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    if sigma == 0:
        return alpha, sigma, math.inf
    return alpha, sigma, -math.inf if alpha == 0 else math.log(alpha) - math.log(sigma)


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++ (2M): second order, multistep, one call a step (Lu et al. 2022, algorithm 2).

    First order at the first step, from pure noise (where the log-SNR is not finite) and to the clean level.
    """

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one step; `memory` is `(x0_hat, lambda)` of the step before."""
        _, sigma, lam = _log_snr_view(process, t)
        alpha_s, sigma_s, lam_s = _log_snr_view(process, s)
        x0 = denoise(x, t)
        pulled = x0
        if memory is not None and math.isfinite(lam_s) and math.isfinite(lam) and math.isfinite(memory[1]):
            x0_before, lam_before = memory
            half_ratio = (lam_s - lam) / (2 * (lam - lam_before))
            pulled = x0 + half_ratio * (x0 - x0_before)
        # -expm1(-h) with h = lambda_s - lambda, written so that infinite lambdas are fine
        decay = 0.0 if math.isinf(lam_s) or math.isinf(lam) else math.exp(lam - lam_s)
        keep = sigma_s / sigma
        return keep * x + alpha_s * (1 - decay) * pulled, x0, (x0, lam)


@dataclass(frozen=True)
class DPMSolverPP2S:
    """DPM-Solver++ (2S): second order, single step with a midpoint in log-SNR (Lu et al. 2022, algorithm 1).

    2n - 1 calls for n steps: the step to the clean level is first order (and a step from pure noise, which costs one).
    """

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one step."""
        _, sigma, lam = _log_snr_view(process, t)
        alpha_s, sigma_s, lam_s = _log_snr_view(process, s)
        x0 = denoise(x, t)
        if math.isinf(lam_s) or math.isinf(lam):
            return sigma_s / sigma * x + alpha_s * x0, x0, None
        middle = float(process.level_at(math.exp(-(lam + lam_s) / 2)))
        alpha_m, sigma_m, lam_m = _log_snr_view(process, middle)
        x_middle = sigma_m / sigma * x + alpha_m * (1 - math.exp(lam - lam_m)) * x0
        ratio = (lam_m - lam) / (lam_s - lam)
        pulled = (1 - 1 / (2 * ratio)) * x0 + denoise(x_middle, middle) / (2 * ratio)
        return sigma_s / sigma * x + alpha_s * (1 - math.exp(lam - lam_s)) * pulled, x0, None
