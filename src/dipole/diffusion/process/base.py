"""What every forward process offers, and the spacings of levels they share."""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace", "linear", "karras", "exponential"]
LevelLike = Tensor | float


@runtime_checkable
class Process(Protocol):
    """What samplers, kernels, objectives and guidance need to know about a forward process.

    Processes are hashable, and never change: what is computed from one and a level is remembered.
    """

    def __hash__(self) -> int:
        """Return a hash."""

    @property
    def clean(self) -> float:
        """Return the level of clean data: alpha = 1, sigma = 0."""

    @property
    def noisiest(self) -> float:
        """Return the level sampling starts from."""

    def alpha(self, t: LevelLike) -> Tensor:
        """Return the signal coefficient, float64, shaped as `t`."""

    def sigma(self, t: LevelLike) -> Tensor:
        """Return the noise coefficient, float64, shaped as `t`."""

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return the standard deviation of the noise that sampling starts with at level `t`."""

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the level whose noise-to-signal ratio sigma/alpha is `ratio` (log-SNR matching of two processes)."""

    def network_time(self, t: LevelLike) -> Tensor:
        """Return what a network is told about `t`, on a scale of about 0..1000 so that one embedding serves all."""

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(scale, u)` such that y = scale * x obeys dy/du = (y - x0_hat) / u."""

    def level_at_ode_time(self, u: LevelLike) -> Tensor:
        """Return the level whose time in `ode_view` is `u`: its inverse (for `VP` the nearest trained level)."""

    def levels(self, num_steps: int, spacing: Spacing = ...) -> Tensor:
        """Return `[num_steps + 1]` decreasing levels, the last one `clean`: `num_steps` network calls."""


def as_level(t: LevelLike) -> Tensor:
    """Return a level as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.to(torch.float64)


def check_num_steps(num_steps: int, most: int | None = None) -> None:
    """Raise ValueError when `num_steps` is not between 1 and `most`."""
    if num_steps < 1 or (most is not None and num_steps > most):
        limit = "at least 1" if most is None else f"between 1 and {most}, the number of trained levels"
        raise ValueError(f"num_steps is {num_steps}: it must be {limit}")


def ratio_levels(process: Process, num_steps: int, spacing: Spacing, low: float, high: float, rho: float) -> Tensor:
    """Return levels spaced in the noise-to-signal ratio between `high` and `low`, then clean.

    `karras`: uniform in ratio^(1/rho) (Karras et al. 2022, eq. 5); `exponential`: uniform in log ratio.
    """
    grid = torch.linspace(0, 1, num_steps, dtype=torch.float64) if num_steps > 1 else torch.zeros(1).double()
    if spacing == "karras":
        ratio = (high ** (1 / rho) + grid * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    elif spacing == "exponential":
        ratio = torch.exp(math.log(high) + grid * (math.log(low) - math.log(high)))
    else:
        raise ValueError(f"unknown spacing '{spacing}' for {type(process).__name__}")
    levels = process.level_at(ratio)
    return torch.cat([levels, levels.new_tensor([process.clean])])
