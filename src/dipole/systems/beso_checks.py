"""Exact checks of BESO: its sampler's step, its levels, its preconditioning."""

from __future__ import annotations

import itertools
import math

import torch

from dipole.diffusion import DDIM, EDM, Heun, LogLogistic, sample
from dipole.diffusion.oracle import MixtureDenoiser
from dipole.diffusion.prediction import conversion
from dipole.systems.card import Claim, Margin, Measure


def identities() -> list[Claim]:
    """Check the identities of the spec."""
    process, generator = EDM(0.005, 1.0, rho=5.0), torch.Generator().manual_seed(0)
    x, x0 = (torch.randn(64, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    levels = process.levels(6, "karras").tolist()
    euler = max(
        float((DDIM().step(x, x0, t, s, process).mean - (x + (s - t) * (x - x0) / t)).abs().max())
        for t, s in itertools.pairwise(levels)
    )
    quiet = max(
        float((DDIM(eta=0.0).step(x, x0, t, s, process).mean - (s / t * x + (1 - s / t) * x0)).abs().max())
        for t, s in itertools.pairwise(levels)
    )
    ends = max(
        abs(float(process.levels(n, spacing)[k]) - edge)
        for spacing in ("exponential", "linear", "karras")
        for n in (2, 3, 10)
        for k, edge in ((0, 1.0), (-2, 0.005), (-1, 0.0))
    )
    denoiser = MixtureDenoiser(torch.ones(2), torch.tensor([[-0.6], [0.6]]), torch.tensor(0.05), process)
    one = process.levels(1, "exponential")
    heun, single = (sample(denoiser, process, one, kernel, init=x[:, :1]) for kernel in (Heun(), DDIM()))
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    _, c_x, c_out = conversion("edm", process, sigma, 0.5)
    power = c_x**2 * (sigma**2 + 0.25) + c_out**2
    small = Margin(high=1e-12)
    return [
        Claim("DDIM is Euler's step", "2e-16", Measure(euler), None, small, "largest difference"),
        Claim("DDIM is (s'/s) x + (1 - s'/s) D", "0", Measure(quiet), None, small, "largest difference"),
        Claim("schedules begin and end at their bounds", "0", Measure(ends), None, small, "largest difference"),
        Claim("Heun with one step is Euler", "0", Measure(float((heun - single).abs().max())), None, small),
        Claim("c_skip^2 (sigma^2 + s^2) + c_out^2 = s^2", "0", Measure(float((power - 0.25).abs().max())), None, small),
        _training_levels(),
    ]


def _training_levels() -> Claim:
    """The Kolmogorov distance of drawn levels from the truncated log-logistic."""
    time, count = LogLogistic(math.log(0.5), 0.5, 0.005, 1.0), 100_000
    drawn = time.sample((count,), EDM(0.005, 1.0), torch.Generator().manual_seed(0)).sort().values
    low, high = (1 / (1 + (edge / 0.5) ** -2) for edge in (0.005, 1.0))  # scale 0.5: the exponent is 2
    exact = (1 / (1 + (drawn / 0.5) ** -2) - low) / (high - low)
    distance = float((exact - (torch.arange(count) + 0.5) / count).abs().max())
    # 1.95 / sqrt(n) is exceeded once in a thousand
    return Claim("training levels are log-logistic", "0", Measure(distance), None, Margin(high=1.95 / math.sqrt(count)))
