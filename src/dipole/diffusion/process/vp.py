"""Variance-preserving processes: DDPM's discrete one (Ho et al. 2020), and in continuous time (Song et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dipole.diffusion.process.base import LevelLike, Spacing, as_level, check_num_steps, ratio_levels


@dataclass(frozen=True, eq=False, repr=False)
class VP:
    """Discrete variance-preserving process of DDPM: level t is an integer in 0..N-1, and -1 is clean.

    Build it with `VP.cosine`, `VP.linear` or `VP.scaled_linear`, in float64. Compared by identity.

    With a table in float32 (`dtype=torch.float32`, or `VP(scheduler.alphas_cumprod)` of a diffusers scheduler) it
    rounds as the schedulers of diffusers do, and a step agrees with theirs to 1e-6 instead of 1e-4: of neighbouring
    levels, 1 - alpha_bar[t] / alpha_bar[s] then has three to four right digits. Coefficients are float64 either way.

    Attributes:
        alpha_bar: `[N]` cumulative products of 1 - beta, decreasing, float64 or float32.
    """

    alpha_bar: Tensor
    _alpha: Tensor = field(init=False)
    _sigma: Tensor = field(init=False)
    _bar: Tensor = field(init=False)
    # Copies on other devices: sending a table there at every call would make the CPU wait for the GPU.
    _sent: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.alpha_bar.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"alpha_bar must be float64 or float32, not {self.alpha_bar.dtype}")
        alpha_bar = self.alpha_bar.to(torch.float64)
        if alpha_bar.dim() != 1 or not bool(((alpha_bar > 0) & (alpha_bar < 1)).all()):
            raise ValueError("alpha_bar must be a vector of numbers strictly between 0 and 1")
        one = torch.ones(1, dtype=torch.float64)
        # The clean level -1 is stored last, where Python's index -1 finds it.
        object.__setattr__(self, "_alpha", torch.cat([alpha_bar.sqrt(), one]))
        object.__setattr__(self, "_sigma", torch.cat([(1 - alpha_bar).sqrt(), one * 0]))
        object.__setattr__(self, "_bar", torch.cat([self.alpha_bar, one.to(self.alpha_bar)]))

    def __repr__(self) -> str:
        return f"VP({self.num_steps} levels, sigma {self.sigma(0):.4g} to {self.sigma(self.noisiest):.4g})"

    @classmethod
    def from_betas(cls, betas: Tensor) -> VP:
        """Return the process with these per-step variances `[N]`, in their dtype."""
        return cls(torch.cumprod(1 - betas, 0))

    @classmethod
    def cosine(cls, num_steps: int = 100, max_beta: float = 0.999, dtype: torch.dtype = torch.float64) -> VP:
        """Return the squared-cosine schedule, `squaredcos_cap_v2` (Nichol & Dhariwal 2021, eq. 17)."""
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta).to(dtype))

    @classmethod
    def linear(
        cls,
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        dtype: torch.dtype = torch.float64,
    ) -> VP:
        """Return betas spaced uniformly (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=dtype))

    @classmethod
    def scaled_linear(
        cls,
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        dtype: torch.dtype = torch.float64,
    ) -> VP:
        """Return betas whose square roots are spaced uniformly (latent diffusion)."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=dtype) ** 2)

    @property
    def num_steps(self) -> int:
        """Return N, the number of trained levels."""
        return self.alpha_bar.shape[0]

    @property
    def clean(self) -> float:
        """Return -1."""
        return -1.0

    @property
    def noisiest(self) -> float:
        """Return N - 1."""
        return float(self.num_steps - 1)

    def _index(self, t: LevelLike) -> Tensor:
        index = torch.as_tensor(t).round().long().clamp(min=-1)
        if not index.is_cuda and index.numel() and int(index.max()) >= self.num_steps:
            raise ValueError(f"level {int(index.max())} of a process whose levels end at {self.num_steps - 1}")
        return index

    def alpha(self, t: LevelLike) -> Tensor:
        """Return sqrt(alpha_bar[t]), and 1 at level -1."""
        index = self._index(t)
        return self._tables(index.device)[0][index]

    def sigma(self, t: LevelLike) -> Tensor:
        """Return sqrt(1 - alpha_bar[t]), and 0 at level -1."""
        index = self._index(t)
        return self._tables(index.device)[1][index]

    def variances(self, t: LevelLike, s: LevelLike) -> tuple[Tensor, Tensor, Tensor]:
        """Return the variances of q(x_t | x_0), q(x_s | x_0) and q(x_t | x_s), in the dtype of `alpha_bar`."""
        t, s = self._index(t), self._index(s)
        bar = self._tables(t.device)[2]
        return 1 - bar[t], 1 - bar[s], 1 - bar[t] / bar[s]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device == self._alpha.device:
            return self._alpha, self._sigma, self._bar
        if device not in self._sent:
            self._sent[device] = (self._alpha.to(device), self._sigma.to(device), self._bar.to(device))
        return self._sent[device]

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the trained level whose ratio is nearest in log scale; a ratio of 0 is clean."""
        ratio = as_level(ratio)
        log_ratio = torch.log(self._sigma[:-1] / self._alpha[:-1]).to(ratio.device)
        nearest = (torch.log(ratio.clamp(1e-300, 1e300)).unsqueeze(-1) - log_ratio).abs().argmin(-1)
        return torch.where(ratio > 0, nearest.double(), -torch.ones_like(ratio))

    def network_time(self, t: LevelLike) -> Tensor:
        """Return the index itself, as DDPM networks expect."""
        return as_level(t)

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1/alpha, sigma/alpha)`: the variance-exploding view."""
        alpha = self.alpha(t)
        return 1 / alpha, self.sigma(t) / alpha

    def level_at_ode_time(self, u: LevelLike) -> Tensor:
        """Return the trained level nearest to sigma/alpha = u."""
        return self.level_at(u)

    def levels(self, num_steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Return integer levels (float64 `[num_steps + 1]`), the last -1.

        `leading` and `trailing` are those of diffusers (`trailing` visits the noisiest level, `leading` ends at
        index 0); `linspace` rounds a uniform grid from N-1 to 0; `karras` and `exponential` space sigma/alpha and
        round to trained levels. Where rounding would visit a level twice, the next free one is taken.

        Raises:
            ValueError: `num_steps` is not between 1 and N.
        """
        n = self.num_steps
        check_num_steps(num_steps, n)
        if spacing == "leading":
            grid = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (n // num_steps)
        elif spacing == "trailing":
            grid = torch.round(n - torch.arange(num_steps, dtype=torch.float64) * (n / num_steps)) - 1
        elif spacing in ("linspace", "linear"):
            grid = torch.linspace(n - 1, 0, num_steps, dtype=torch.float64).round()
        else:
            ratio = self._sigma[:-1] / self._alpha[:-1]
            grid = ratio_levels(self, num_steps, spacing, float(ratio[0]), float(ratio[-1]), rho=7.0)[:-1]
        return torch.tensor([*_distinct(grid.tolist()), -1.0], dtype=torch.float64)


def _distinct(levels: list[float]) -> list[float]:
    """Return strictly decreasing levels, each moved as little as fits: down below its predecessor, then up from 0."""
    for k in range(1, len(levels)):
        levels[k] = min(levels[k], levels[k - 1] - 1)
    return [max(level, float(len(levels) - 1 - k)) for k, level in enumerate(levels)]


@dataclass(frozen=True)
class ContinuousVP:
    """Variance-preserving process in continuous time t in [0, 1].

    Attributes:
        schedule: `cosine` (alpha = cos of an angle that grows linearly) or `linear` (beta grows linearly; Song et al.
            2021).
        beta_min: Smallest beta of the linear schedule.
        beta_max: Largest beta of the linear schedule.
        t_min: Smallest level visited before clean.
        t_max: Largest level; just below 1 for `cosine`, where alpha(1) = 0.
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 0.999

    @property
    def clean(self) -> float:
        """Return 0."""
        return 0.0

    @property
    def noisiest(self) -> float:
        """Return `t_max`."""
        return self.t_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: LevelLike) -> Tensor:
        """Return the signal coefficient."""
        t = as_level(t)
        return torch.cos(t * math.pi / 2) if self.schedule == "cosine" else torch.exp(self._log_alpha(t))

    def sigma(self, t: LevelLike) -> Tensor:
        """Return the noise coefficient."""
        t = as_level(t)
        if self.schedule == "cosine":
            return torch.sin(t * math.pi / 2)
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the time with this sigma/alpha."""
        ratio = as_level(ratio)
        if self.schedule == "cosine":
            return torch.atan(ratio) * 2 / math.pi
        # log alpha = -log(1 + ratio^2)/2, and log alpha is a quadratic in t
        log_alpha = -0.5 * torch.log1p(ratio**2)
        slope = self.beta_max - self.beta_min
        return (-self.beta_min + torch.sqrt(self.beta_min**2 - 4 * slope * log_alpha)) / slope

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 1000 t."""
        return as_level(t) * 1000

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1/alpha, sigma/alpha)`."""
        alpha = self.alpha(t)
        return 1 / alpha, self.sigma(t) / alpha

    def level_at_ode_time(self, u: LevelLike) -> Tensor:
        """Return the level with sigma/alpha = u."""
        return self.level_at(u)

    def levels(self, num_steps: int, spacing: Spacing = "linear") -> Tensor:
        """Return `[num_steps + 1]` times from `t_max` to 0; `linear` is uniform in t."""
        check_num_steps(num_steps)
        if spacing in ("linear", "linspace", "trailing"):
            return torch.linspace(self.t_max, 0, num_steps + 1, dtype=torch.float64)
        low, high = (float(self.ode_view(t)[1]) for t in (self.t_min, self.t_max))
        return ratio_levels(self, num_steps, spacing, low, high, rho=7.0)
