"""The linear interpolation of flow matching and rectified flow (Lipman et al. 2023; Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dipole.diffusion.process.base import LevelLike, Spacing, as_level, check_num_steps, ratio_levels


@dataclass(frozen=True)
class Flow:
    """Linear interpolation x = (1 - t) x0 + t eps: t = 1 is noise, t = 0 is data (rectified flow, flow matching).

    Libraries whose clock runs the other way (t = 1 is data) are converted at the border: see `from_data_at_one` and
    `NetworkDenoiser.clock`.

    Attributes:
        t_min: Smallest level of the ratio spacings before clean.
        shift: Time shift s: levels t become s t / (1 + (s - 1) t); 1 leaves them as they are (Esser et al. 2024).
    """

    t_min: float = 1e-3
    shift: float = 1.0

    @property
    def clean(self) -> float:
        """Return 0."""
        return 0.0

    @property
    def noisiest(self) -> float:
        """Return 1."""
        return 1.0

    @staticmethod
    def from_data_at_one(t: Tensor) -> Tensor:
        """Return our level for a time of the other convention (0 is noise, 1 is data)."""
        return 1 - t

    def alpha(self, t: LevelLike) -> Tensor:
        """Return 1 - t."""
        return 1 - as_level(t)

    def sigma(self, t: LevelLike) -> Tensor:
        """Return t."""
        return as_level(t)

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return ratio / (1 + ratio)."""
        ratio = as_level(ratio)
        return torch.where(torch.isinf(ratio), 1.0, ratio / (1 + ratio))

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 1000 t."""
        return as_level(t) * 1000

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1, t)`: the velocity is eps - x0 = (x - x0) / t."""
        t = as_level(t)
        return torch.ones_like(t), t

    def level_at_ode_time(self, u: LevelLike) -> Tensor:
        """Return `u` itself."""
        return as_level(u)

    def levels(self, num_steps: int, spacing: Spacing = "linear") -> Tensor:
        """Return `[num_steps + 1]` times from 1 to 0, shifted by `shift`; ratio spacings start at 1 as well."""
        check_num_steps(num_steps)
        if spacing in ("linear", "linspace", "trailing"):
            grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        else:
            low = self.t_min / (1 - self.t_min)
            grid = ratio_levels(self, num_steps, spacing, low, 1 / low, rho=7.0)
            grid[0] = 1.0
        return self.shift * grid / (1 + (self.shift - 1) * grid)
