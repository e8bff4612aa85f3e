"""The variance-exploding process of EDM (Karras et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dipole.diffusion.process.base import LevelLike, Spacing, as_level, check_num_steps, ratio_levels


@dataclass(frozen=True)
class EDM:
    """Variance-exploding process: the level is the noise itself, x = x0 + sigma eps (Karras et al. 2022).

    Attributes:
        sigma_min: Smallest noise visited before clean.
        sigma_max: Noise that sampling starts from.
        rho: Curvature of the `karras` spacing.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def clean(self) -> float:
        """Return 0."""
        return 0.0

    @property
    def noisiest(self) -> float:
        """Return `sigma_max`."""
        return self.sigma_max

    def alpha(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(as_level(t))

    def sigma(self, t: LevelLike) -> Tensor:
        """Return the level itself."""
        return as_level(t)

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return the level itself."""
        return as_level(t)

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the ratio itself."""
        return as_level(ratio)

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 250 ln(sigma): EDM's c_noise = ln(sigma)/4 on a scale of thousands; sigma is floored at 1e-20."""
        return 250 * torch.log(as_level(t).clamp(min=1e-20))

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1, sigma)`."""
        t = as_level(t)
        return torch.ones_like(t), t

    def level_at_ode_time(self, u: LevelLike) -> Tensor:
        """Return `u` itself."""
        return as_level(u)

    def levels(self, num_steps: int, spacing: Spacing = "karras") -> Tensor:
        """Return `[num_steps + 1]` noises from sigma_max to sigma_min, then 0."""
        check_num_steps(num_steps)
        if spacing in ("linear", "linspace"):
            grid = torch.linspace(self.sigma_max, self.sigma_min, num_steps, dtype=torch.float64)
            return torch.cat([grid, grid.new_zeros(1)])
        return ratio_levels(self, num_steps, spacing, self.sigma_min, self.sigma_max, self.rho)
