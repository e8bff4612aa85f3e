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
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dipole.diffusion.process import Process
from dipole.diffusion.tensors import Random, randn, scaled, weighted_sum

Denoise = Callable[[Tensor, float], Tensor]


class Solver(Protocol):
    """One way to advance a sample; stateless: what it remembers from step to step goes in and out as `memory`."""

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return `(x at level s, x0_hat at level t, memory for the next step)`; `memory` is None at the first step."""


@lru_cache(maxsize=8192)
def _view(process: Process, t: float) -> tuple[float, float]:
    """Return `(scale, u)` of the process's ODE view."""
    scale, u = process.ode_view(t)
    return float(scale), float(u)


@lru_cache(maxsize=8192)
def _midpoint(process: Process, u: float, u_s: float) -> float:
    """Return the level at the geometric mean of two ODE times."""
    return float(process.level_at_ode_time(math.sqrt(u * u_s)))


def _euler(y: Tensor, x0: Tensor, u: float, u_s: float) -> Tensor:
    """Return y + (u_s - u) (y - x0) / u."""
    return weighted_sum(u_s / u, y, 1 - u_s / u, x0)


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
        y = scaled(x, scale)
        y_next = _euler(y, x0, u, u_s)
        if u_s > 0:
            slope = (y - x0) / u
            slope_next = (y_next - denoise(scaled(y_next, 1 / scale_s), s)) / u_s
            y_next = y + (slope + slope_next) * ((u_s - u) / 2)
        return scaled(y_next, 1 / scale_s), x0, None

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
        y = scaled(x, scale)
        if u_s == 0:
            return scaled(_euler(y, x0, u, u_s), 1 / scale_s), x0, None
        middle = _midpoint(process, u, u_s)
        scale_middle, u_middle = _view(process, middle)
        y_middle = _euler(y, x0, u, u_middle)
        slope = (y_middle - denoise(scaled(y_middle, 1 / scale_middle), middle)) / u_middle
        return scaled(y + slope * (u_s - u), 1 / scale_s), x0, None


class _LogSNR(NamedTuple):
    """A level as DPM-Solver++ sees it; lambda = log(alpha / sigma) is infinite where there is no noise or no signal."""

    alpha: float
    sigma: float
    lam: float


@lru_cache(maxsize=8192)
def _log_snr(process: Process, t: float) -> _LogSNR:
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    if sigma == 0 or alpha == 0:
        return _LogSNR(alpha, sigma, math.inf if sigma == 0 else -math.inf)
    return _LogSNR(alpha, sigma, math.log(alpha) - math.log(sigma))


def _exponential_step(x: Tensor, x0: Tensor, start: _LogSNR, end: _LogSNR) -> Tensor:
    """Return the exact solution of the ODE from `start` to `end` while x0_hat stays `x0` (Lu et al. 2022, eq. 9)."""
    # 1 - exp(-h) with h = lambda_end - lambda_start, written so that infinite lambdas are fine
    finite = math.isfinite(start.lam) and math.isfinite(end.lam)
    growth = -math.expm1(start.lam - end.lam) if finite else 1.0
    return weighted_sum(end.sigma / start.sigma, x, end.alpha * growth, x0)


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++ (2M): second order, multistep, one call a step (Lu et al. 2022, algorithm 2).

    First order at the first step, from pure noise (where the log-SNR is not finite) and to the clean level.
    """

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one step; `memory` is `(x0_hat, lambda)` of the step before."""
        start, end = _log_snr(process, t), _log_snr(process, s)
        x0 = denoise(x, t)
        pulled = x0
        if memory is not None and math.isfinite(end.lam) and math.isfinite(memory[1]):
            x0_before, lam_before = memory
            half_ratio = (end.lam - start.lam) / (2 * (start.lam - lam_before))
            pulled = weighted_sum(1 + half_ratio, x0, -half_ratio, x0_before)
        return _exponential_step(x, pulled, start, end), x0, (x0, start.lam)


@dataclass(frozen=True)
class DPMSolverPP2S:
    """DPM-Solver++ (2S): second order, single step with a midpoint in log-SNR (Lu et al. 2022, algorithm 1).

    2n - 1 calls for n steps: the step to the clean level is first order. Fewer where a step starts from pure noise
    (`Flow` at 1) or no trained level of a `VP` lies between its ends: such steps are first order as well.
    """

    def solve(
        self, denoise: Denoise, x: Tensor, t: float, s: float, process: Process, memory: Any, generator: Random
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the sample after one step."""
        start, end = _log_snr(process, t), _log_snr(process, s)
        x0 = denoise(x, t)
        if math.isinf(end.lam) or math.isinf(start.lam):
            return _exponential_step(x, x0, start, end), x0, None
        level = _log_snr_midpoint(process, start.lam, end.lam)
        middle = _log_snr(process, level)
        if middle == start:
            return _exponential_step(x, x0, start, end), x0, None
        x0_middle = denoise(_exponential_step(x, x0, start, middle), level)
        share = (end.lam - start.lam) / (2 * (middle.lam - start.lam))
        return _exponential_step(x, weighted_sum(1 - share, x0, share, x0_middle), start, end), x0, None


@lru_cache(maxsize=8192)
def _log_snr_midpoint(process: Process, lam: float, lam_s: float) -> float:
    return float(process.level_at(math.exp(-(lam + lam_s) / 2)))
