"""Training objectives: draw a level and noise, ask the network, compare with the target.

    loss = DenoisingObjective(process, "velocity", time=LogitNormal())(network, x0, cond, generator=g, mask=mask)

Sources: Ho et al. 2020, eq. 14 (epsilon); Karras et al. 2022 (edm, log-normal); BESO (log-logistic);
Esser et al. 2024 (logit-normal); openpi (beta); Hang et al. 2023 (min-SNR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from dipole.diffusion.denoiser import Clock, Processes, network_time, to_our_clock
from dipole.diffusion.prediction import PredictionType, add_noise, conversion, target
from dipole.diffusion.process import VP, Process
from dipole.diffusion.tensors import expand, map_parts, randn_like, rows

Weighting = Literal["one", "x0", "min_snr"]


class TimeDistribution(Protocol):
    """Which levels are trained, and how often."""

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape, float64, on the generator's device."""


def _uniform(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=_device(generator))


def _normal(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=_device(generator))


def _device(generator: Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


@dataclass(frozen=True)
class Uniform:
    """All levels alike: integers 0..N-1 of a `VP`, else uniform between `low` and the noisiest level."""

    low: float = 0.0

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape."""
        if isinstance(process, VP):
            return torch.randint(0, process.num_steps, shape, generator=generator, device=_device(generator)).double()
        low = max(self.low, process.clean)
        return low + (process.noisiest - low) * _uniform(shape, generator)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std * normal), scaled to the noisiest level: for `Flow` and `ContinuousVP`."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape."""
        return process.noisiest * torch.sigmoid(self.mean + self.std * _normal(shape, generator))


@dataclass(frozen=True)
class Beta:
    """t = low + (1 - low) * Beta(a, b): for `Flow`; a=1.5, b=1, low=0.001 is openpi's, which favours noise."""

    a: float = 1.5
    b: float = 1.0
    low: float = 0.001

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape."""
        if self.b == 1.0:
            draw = _uniform(shape, generator) ** (1 / self.a)
        else:
            one = torch.ones(shape, dtype=torch.float64, device=_device(generator))
            left = torch._standard_gamma(one * self.a, generator=generator)
            draw = left / (left + torch._standard_gamma(one * self.b, generator=generator))
        return process.noisiest * (self.low + (1 - self.low) * draw)


@dataclass(frozen=True)
class LogLogistic:
    """sigma from a log-logistic truncated to `[low, high]`, by inverse CDF: for `EDM` (BESO: loc ln 0.5, scale 0.5)."""

    loc: float = math.log(0.5)
    scale: float = 0.5
    low: float = 0.005
    high: float = 1.0

    def cdf(self, sigma: Tensor) -> Tensor:
        """Return the untruncated distribution function at `sigma`."""
        return torch.sigmoid((torch.log(sigma) - self.loc) / self.scale)

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape."""
        low, high = (self.cdf(torch.tensor(edge, dtype=torch.float64)) for edge in (self.low, self.high))
        u = low + (high - low) * _uniform(shape, generator)
        return torch.exp(self.loc + self.scale * torch.logit(u)).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """sigma = exp(mean + std * normal): for `EDM` (Karras et al. 2022: -1.2, 1.2)."""

    mean: float = -1.2
    std: float = 1.2

    def sample(self, shape: tuple[int, ...], process: Process, generator: Generator | None = None) -> Tensor:
        """Return levels of this shape."""
        return torch.exp(self.mean + self.std * _normal(shape, generator))


@dataclass(frozen=True)
class DenoisingObjective:
    """Weighted squared error between a network's output and its target.

    Attributes:
        process: Forward process (one for all parts, or one per part).
        prediction_type: What the network predicts.
        time: Distribution of the levels.
        weighting: Weight of each level on the error of the network's output: `one`; `x0`: the error of x0_hat
            instead; `min_snr`: min(SNR, gamma) on the error of x0_hat.
        min_snr_gamma: Gamma of `min_snr`.
        sigma_data: For `edm`.
        clock: As in `NetworkDenoiser`: `data_at_one` trains a flow network whose own time is 1 at the data.
        levels: How many levels a row gets: `row` one `[B]`, `position` one per position `[B, T]`, `part` one per row
            and part. Any other scheme: pass `t`.
    """

    process: Processes
    prediction_type: PredictionType = "epsilon"
    time: TimeDistribution = field(default_factory=Uniform)
    weighting: Weighting = "one"
    min_snr_gamma: float = 5.0
    sigma_data: float = 0.5
    clock: Clock = "noise_at_one"
    levels: Literal["row", "position", "part"] = "row"

    def __call__(
        self,
        network: Callable[..., Any],
        x0: Any,
        cond: Any = None,
        *,
        generator: Generator | None = None,
        mask: Any = None,
        t: Any = None,
        noise: Any = None,
    ) -> Tensor:
        """Return the mean loss (a scalar); parts are added with equal weight.

        Args:
            network: `network(x, time, cond) -> output`, as in `NetworkDenoiser`.
            x0: Clean data `[B, T, D]` or parts.
            cond: Conditioning.
            generator: Source of levels and noise.
            mask: Entries that count, `[B]`, `[B, T]` or broadcastable to `x0` (padding is masked out), or parts.
            t: Levels to use instead of drawing them: `[B]`, `[B, T]` or parts.
            noise: Noise to use instead of drawing it.
        """
        losses = self.per_part(network, x0, cond, generator=generator, mask=mask, t=t, noise=noise)
        return losses if isinstance(losses, Tensor) else torch.stack(list(losses.values())).sum()

    def per_part(
        self,
        network: Callable[..., Any],
        x0: Any,
        cond: Any = None,
        *,
        generator: Generator | None = None,
        mask: Any = None,
        t: Any = None,
        noise: Any = None,
    ) -> Any:
        """Return the loss as `__call__` does, but one per part."""
        t = self.draw_levels(x0, generator) if t is None else map_parts(lambda part, t: rows(t, part), x0, t)
        noise = randn_like(x0, generator) if noise is None else noise
        x = map_parts(add_noise, x0, noise, t, self.process)
        output = network(map_parts(self._scaled, x, t, self.process), map_parts(self._time, x0, t, self.process), cond)
        return map_parts(self._loss, x0, noise, t, output, self.process, mask)

    def draw_levels(self, x0: Any, generator: Generator | None = None) -> Any:
        """Return levels for a batch: `[B]`, `[B, T]` or parts (on the device of `x0`)."""
        if not isinstance(x0, Mapping):
            return self._draw(x0, self.process, generator)
        if self.levels == "row" and not isinstance(self.process, Mapping):
            return dict.fromkeys(x0, self._draw(next(iter(x0.values())), self.process, generator))
        if self.levels == "row":
            raise ValueError("parts with a process each cannot share one level: use levels='part', or pass t")
        return map_parts(lambda part, process: self._draw(part, process, generator), x0, self.process)

    def _draw(self, x0: Tensor, process: Any, generator: Generator | None) -> Tensor:
        shape = tuple(x0.shape[: 2 if self.levels == "position" else 1])
        return self.time.sample(shape, process, generator).to(x0.device)

    def _time(self, x0: Tensor, t: Tensor, process: Process) -> Tensor:
        return network_time(t, process, x0.dtype, self.clock)

    def _scaled(self, x: Tensor, t: Tensor, process: Process) -> Tensor:
        if self.prediction_type != "edm":
            return x
        return x * expand(conversion("edm", process, t, self.sigma_data).c_in, x).to(x)

    def _loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, output: Tensor, process: Process, mask: Tensor | None
    ) -> Tensor:
        goal = target(x0, noise, t, process, self.prediction_type, self.sigma_data)
        output = to_our_clock(output.to(goal.dtype), self.prediction_type, self.clock)
        error = (output - goal) ** 2
        if self.weighting != "one":
            weight = conversion(self.prediction_type, process, t, self.sigma_data).c_out ** 2
            if self.weighting == "min_snr":
                snr = (process.alpha(t) / process.sigma(t)) ** 2
                weight = weight * snr.clamp(max=self.min_snr_gamma)
            error = error * expand(weight, error).to(error)
        if mask is None:
            return error.mean()
        counts = expand(mask, error).expand_as(error).to(error.dtype)
        return (error * counts).sum() / counts.sum().clamp(min=1)
