"""Forward processes: how clean data becomes noise. Every one is  x_t = alpha(t) x0 + sigma(t) eps.

A level `t` is measured in the unit of its process, and larger is always noisier:

| process        | level                       | clean | alpha, sigma                                            |
|----------------|-----------------------------|-------|---------------------------------------------------------|
| `VP`           | integer index 0 .. N-1      | -1    | alpha^2 = alpha_bar[t], sigma^2 = 1 - alpha_bar[t]      |
| `ContinuousVP` | time in [0, 1]              | 0     | alpha^2 + sigma^2 = 1                                   |
| `EDM`          | the noise sigma             | 0     | alpha = 1, sigma = t (variance exploding)               |
| `Flow`         | time in [0, 1], 1 is noise  | 0     | alpha = 1 - t, sigma = t (linear interpolation)         |

Sources: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (cosine); Song et al. 2021 (VP-SDE); Karras et al. 2022 (EDM);
Lipman et al. 2023 (flow matching). All coefficients are computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace", "linear", "karras", "exponential"]
LevelLike = Tensor | float


@runtime_checkable
class Process(Protocol):
    """What samplers, kernels, objectives and guidance need to know about a forward process."""

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

    def levels(self, num_steps: int, spacing: Spacing = ...) -> Tensor:
        """Return `[num_steps + 1]` decreasing levels, the last one `clean`: `num_steps` network calls."""


def _as_level(t: LevelLike) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.to(torch.float64)


def _check_num_steps(num_steps: int, most: int | None = None) -> None:
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


@dataclass(frozen=True, eq=False)
class VP:
    """Discrete variance-preserving process of DDPM: level t is an integer in 0..N-1, and -1 is clean.

    Build it with `VP.cosine`, `VP.linear` or `VP.scaled_linear`. Compared by identity.

    Attributes:
        alpha_bar: `[N]` cumulative products of 1 - beta, float64, decreasing.
    """

    alpha_bar: Tensor
    _alpha: Tensor = field(init=False, repr=False)
    _sigma: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        alpha_bar = self.alpha_bar.to(torch.float64)
        if alpha_bar.dim() != 1 or not bool(((alpha_bar > 0) & (alpha_bar < 1)).all()):
            raise ValueError("alpha_bar must be a vector of numbers strictly between 0 and 1")
        one = torch.ones(1, dtype=torch.float64)
        # The clean level -1 is stored last, where Python's index -1 finds it.
        object.__setattr__(self, "_alpha", torch.cat([alpha_bar.sqrt(), one]))
        object.__setattr__(self, "_sigma", torch.cat([(1 - alpha_bar).sqrt(), one * 0]))

    @classmethod
    def from_betas(cls, betas: Tensor) -> VP:
        """Return the process with these per-step variances `[N]`."""
        return cls(torch.cumprod(1 - betas.to(torch.float64), 0))

    @classmethod
    def cosine(cls, num_steps: int = 100, max_beta: float = 0.999) -> VP:
        """Return the squared-cosine schedule, `squaredcos_cap_v2` (Nichol & Dhariwal 2021, eq. 17)."""
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))

    @classmethod
    def linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VP:
        """Return betas spaced uniformly (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VP:
        """Return betas whose square roots are spaced uniformly (latent diffusion)."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2)

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
        return torch.as_tensor(t).round().long().clamp(-1, self.num_steps - 1)

    def alpha(self, t: LevelLike) -> Tensor:
        """Return sqrt(alpha_bar[t]), and 1 at level -1."""
        index = self._index(t)
        return self._alpha.to(index.device)[index]

    def sigma(self, t: LevelLike) -> Tensor:
        """Return sqrt(1 - alpha_bar[t]), and 0 at level -1."""
        index = self._index(t)
        return self._sigma.to(index.device)[index]

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(_as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the trained level whose ratio is nearest in log scale; a ratio of 0 is clean."""
        ratio = _as_level(ratio)
        log_ratio = torch.log(self._sigma[:-1] / self._alpha[:-1])
        nearest = (torch.log(ratio.clamp(min=1e-300)).unsqueeze(-1) - log_ratio).abs().argmin(-1)
        return torch.where(ratio > 0, nearest.double(), -torch.ones_like(ratio))

    def network_time(self, t: LevelLike) -> Tensor:
        """Return the index itself, as DDPM networks expect."""
        return _as_level(t)

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1/alpha, sigma/alpha)`: the variance-exploding view."""
        alpha = self.alpha(t)
        return 1 / alpha, self.sigma(t) / alpha

    def levels(self, num_steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Return integer levels (float64 `[num_steps + 1]`), the last -1.

        `leading` and `trailing` are those of diffusers (`trailing` visits the noisiest level, `leading` ends at
        index 0); `linspace` rounds a uniform grid from N-1 to 0; `karras` and `exponential` space sigma/alpha and
        round to trained levels.

        Raises:
            ValueError: `num_steps` is not between 1 and N, or rounding would visit one level twice.
        """
        n = self.num_steps
        _check_num_steps(num_steps, n)
        if spacing == "leading":
            grid = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (n // num_steps)
        elif spacing == "trailing":
            grid = torch.round(n - torch.arange(num_steps, dtype=torch.float64) * (n / num_steps)) - 1
        elif spacing in ("linspace", "linear"):
            grid = torch.linspace(n - 1, 0, num_steps, dtype=torch.float64).round()
        else:
            ratio = self._sigma[:-1] / self._alpha[:-1]
            grid = ratio_levels(self, num_steps, spacing, float(ratio[0]), float(ratio[-1]), rho=7.0)[:-1]
        if bool((grid[1:] >= grid[:-1]).any()):
            raise ValueError(f"{num_steps} levels with spacing '{spacing}' do not fit on {n} trained ones: use fewer")
        return torch.cat([grid, grid.new_tensor([-1.0])])


@dataclass(frozen=True)
class ContinuousVP:
    """Variance-preserving process in continuous time t in [0, 1].

    Attributes:
        schedule: `cosine` (alpha = cos of an angle growing linearly) or `linear` (beta grows linearly; Song et al. 2021).
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
        t = _as_level(t)
        return torch.cos(t * math.pi / 2) if self.schedule == "cosine" else torch.exp(self._log_alpha(t))

    def sigma(self, t: LevelLike) -> Tensor:
        """Return the noise coefficient."""
        t = _as_level(t)
        if self.schedule == "cosine":
            return torch.sin(t * math.pi / 2)
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(_as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the time with this sigma/alpha."""
        ratio = _as_level(ratio)
        if self.schedule == "cosine":
            return torch.atan(ratio) * 2 / math.pi
        # log alpha = -log(1 + ratio^2)/2, and log alpha is a quadratic in t
        log_alpha = -0.5 * torch.log1p(ratio**2)
        slope = self.beta_max - self.beta_min
        return (-self.beta_min + torch.sqrt(self.beta_min**2 - 4 * slope * log_alpha)) / slope

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 1000 t."""
        return _as_level(t) * 1000

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1/alpha, sigma/alpha)`."""
        alpha = self.alpha(t)
        return 1 / alpha, self.sigma(t) / alpha

    def levels(self, num_steps: int, spacing: Spacing = "linear") -> Tensor:
        """Return `[num_steps + 1]` times from `t_max` to 0; `linear` is uniform in t."""
        _check_num_steps(num_steps)
        if spacing in ("linear", "linspace", "trailing"):
            return torch.linspace(self.t_max, 0, num_steps + 1, dtype=torch.float64)
        low, high = (float(self.ode_view(t)[1]) for t in (self.t_min, self.t_max))
        return ratio_levels(self, num_steps, spacing, low, high, rho=7.0)


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
        return torch.ones_like(_as_level(t))

    def sigma(self, t: LevelLike) -> Tensor:
        """Return the level itself."""
        return _as_level(t)

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return the level itself."""
        return _as_level(t)

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return the ratio itself."""
        return _as_level(ratio)

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 250 ln(sigma): EDM's c_noise = ln(sigma)/4 on a scale of thousands; sigma is floored at 1e-20."""
        return 250 * torch.log(_as_level(t).clamp(min=1e-20))

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1, sigma)`."""
        t = _as_level(t)
        return torch.ones_like(t), t

    def levels(self, num_steps: int, spacing: Spacing = "karras") -> Tensor:
        """Return `[num_steps + 1]` noises from sigma_max to sigma_min, then 0."""
        _check_num_steps(num_steps)
        if spacing in ("linear", "linspace"):
            grid = torch.linspace(self.sigma_max, self.sigma_min, num_steps, dtype=torch.float64)
            return torch.cat([grid, grid.new_zeros(1)])
        return ratio_levels(self, num_steps, spacing, self.sigma_min, self.sigma_max, self.rho)


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
        return 1 - _as_level(t)

    def sigma(self, t: LevelLike) -> Tensor:
        """Return t."""
        return _as_level(t)

    def prior_std(self, t: LevelLike) -> Tensor:
        """Return 1."""
        return torch.ones_like(_as_level(t))

    def level_at(self, ratio: LevelLike) -> Tensor:
        """Return ratio / (1 + ratio)."""
        ratio = _as_level(ratio)
        return torch.where(torch.isinf(ratio), 1.0, ratio / (1 + ratio))

    def network_time(self, t: LevelLike) -> Tensor:
        """Return 1000 t."""
        return _as_level(t) * 1000

    def ode_view(self, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return `(1, t)`: the velocity is eps - x0 = (x - x0) / t."""
        t = _as_level(t)
        return torch.ones_like(t), t

    def levels(self, num_steps: int, spacing: Spacing = "linear") -> Tensor:
        """Return `[num_steps + 1]` times from 1 to 0, shifted by `shift`; ratio spacings start at 1 as well."""
        _check_num_steps(num_steps)
        if spacing in ("linear", "linspace", "trailing"):
            grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        else:
            low = self.t_min / (1 - self.t_min)
            grid = ratio_levels(self, num_steps, spacing, low, 1 / low, rho=7.0)
            grid[0] = 1.0
        return self.shift * grid / (1 + (self.shift - 1) * grid)
