"""Composition: several denoisers as one, by a weighted mean of their scores (spec c4).

Source: Cao et al., "General Policy Composition" (arXiv 2510.01068). All denoisers look at the same noisy sample; there
eps, score, v and x0 of each are the same affine map of each other, so that mixing any of them with weights that sum
to 1 is mixing x0_hat. The composed score is not the score of a noised product: of two Gaussians of equal covariance
it samples exactly N(sum w m, S), otherwise only the score as the noise vanishes is that of the product of powers.

Parents that do not share a process, an affine normalisation or a length are made to by `SpaceView` and by `spans`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, prepare
from dipole.diffusion.process import LevelLike, Process
from dipole.diffusion.tensors import Level, expand

Span = tuple[int, int]


@dataclass(frozen=True)
class Composition:
    """The mean of several denoisers, weighted.

    Attributes:
        denoisers: M parents. All are called with the same conditioning; `Selected` picks a parent's own from it.
        weights: M numbers that sum to 1; convex where none is negative. A parent of weight 0 is not called where
            others answer, and one of weight 1 is returned bit for bit.
        spans: For samples `[B, T, D]`: the positions `start:stop` each parent denoises; it sees only those. At every
            position the parents that cover it share it by their weights, and where those are all 0, equally. Empty:
            all cover everything.
    """

    denoisers: tuple[Denoiser, ...]
    weights: tuple[float, ...]
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.denoisers)
        if count < 1 or len(self.weights) != count or len(self.spans) not in (0, count):
            raise ValueError(f"{count} denoisers need as many weights, and as many spans or none")
        if not math.isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise ValueError(f"weights {self.weights} must sum to 1")
        if self.spans and min(self.weights) < 0:
            raise ValueError("negative weights do not go with spans: a share of a position must be between 0 and 1")

    @classmethod
    def product(cls, base: Denoiser, denoisers: Sequence[Denoiser], weights: Sequence[float]) -> Composition:
        """Return eps_base + sum w_i (eps_i - eps_base): classifier-free guidance with several conditions."""
        return cls((base, *denoisers), (1 - sum(weights), *weights))

    def __call__(self, x: Tensor, t: LevelLike, cond: Any = None) -> Tensor:
        """Return x0_hat, shaped as `x`."""
        if not self.spans:
            return self._whole(x, t, cond)
        table = shares(self.weights, self.spans, x.shape[1])
        mixed = torch.zeros_like(x)
        for denoiser, (start, stop), share in zip(self.denoisers, self.spans, table, strict=True):
            part = share[start:stop]
            if any(part):
                fraction = torch.tensor(part, dtype=x.dtype, device=x.device).unsqueeze(-1)
                own = denoiser(x[:, start:stop], _level_of(t, start, stop), cond)
                mixed[:, start:stop] = torch.lerp(mixed[:, start:stop], own, fraction)
        return mixed

    def _whole(self, x: Tensor, t: LevelLike, cond: Any) -> Tensor:
        """Mix without spans: first + sum w (other - first), exact for equal answers and for a single parent."""
        active = [i for i, weight in enumerate(self.weights) if weight != 0]
        first: Tensor = self.denoisers[active[0]](x, t, cond)
        mixed = first
        for i in active[1:]:
            mixed = mixed + self.weights[i] * (self.denoisers[i](x, t, cond) - first)
        return mixed

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare every parent for the levels it will see."""
        seen = [levels] * len(self.denoisers)
        if isinstance(levels, Tensor) and levels.dim() == 3 and levels.shape[-1] > 1 and self.spans:
            seen = [levels[..., start:stop] for start, stop in self.spans]
        ready = tuple(prepare(denoiser, own, cond) for denoiser, own in zip(self.denoisers, seen, strict=True))
        return replace(self, denoisers=ready)


def _level_of(t: Any, start: int, stop: int) -> Any:
    """Return the levels of some positions; a level per row or for all stays."""
    return t[:, start:stop] if isinstance(t, Tensor) and t.dim() > 1 and t.shape[1] > 1 else t


@lru_cache(maxsize=256)
def shares(weights: tuple[float, ...], spans: tuple[Span, ...], length: int) -> tuple[tuple[float, ...], ...]:
    """Return for each parent and position the fraction its answer gets in a blend with the parents before it.

    Blending one after the other by `lerp` leaves equal answers, and those of a lone parent, as they are to the bit.
    """
    if min(start for start, _ in spans) != 0 or max(stop for _, stop in spans) != length:
        raise ValueError(f"spans {spans} do not cover a sample of {length} positions")
    table = [[0.0] * length for _ in weights]
    for position in range(length):
        covering = [i for i, (start, stop) in enumerate(spans) if start <= position < stop]
        if not covering:
            raise ValueError(f"position {position} of the sample lies in none of the spans {spans}")
        idle = all(weights[i] == 0 for i in covering)
        total = 0.0
        for i in covering:
            weight = 1.0 if idle else weights[i]
            total += weight
            table[i][position] = weight / total if weight else 0.0
    return tuple(map(tuple, table))


@dataclass(frozen=True)
class Selected:
    """A denoiser that finds its own conditioning among that of several: the keys that begin with `prefix`."""

    denoiser: Denoiser
    prefix: str

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat, shaped as `x`."""
        return self.denoiser(x, t, self._own(cond))

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare the denoiser for its own conditioning."""
        return replace(self, denoiser=prepare(self.denoiser, levels, self._own(cond)))

    def _own(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cut = len(self.prefix)
        return {key[cut:]: value for key, value in cond.items() if key.startswith(self.prefix)}


@dataclass(frozen=True, eq=False)
class SpaceView:
    """A denoiser seen in another process and in other units: own clean sample = scale * other + offset.

    A scale that is the same in every dimension only moves the noise-to-signal ratio, so the view is exact: the own
    level is that of ratio' = |scale| ratio, and  x' = alpha' (scale x / alpha + offset). With different scales the
    noise differs between dimensions, which no level can say: the geometric mean stands in, and it is the caller's to
    judge how far that may go.

    Attributes:
        denoiser: Denoiser of `own`, in own units.
        own: Its process.
        other: Process it is called in.
        scale: Broadcastable to the sample, not 0.
        offset: Broadcastable to the sample.
    """

    denoiser: Denoiser
    own: Process
    other: Process
    scale: Tensor
    offset: Tensor

    def __call__(self, x: Tensor, t: LevelLike, cond: Any = None) -> Tensor:
        """Return x0_hat in other units for `x` `[B, ...]` at level `t` of `other`."""
        scale, offset = self.scale.to(x), self.offset.to(x)
        if isinstance(t, Tensor):
            level, factor, signal = self._matched(t)
            moved = x * (expand(factor, x).to(x) * scale) + expand(signal, x).to(x) * offset
            return (self.denoiser(moved, level, cond) - offset) / scale
        number, factor_, signal_ = (float(value) for value in self._matched(torch.tensor(t, dtype=torch.float64)))
        return (self.denoiser(x * (factor_ * scale) + signal_ * offset, number, cond) - offset) / scale

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Let the denoiser prepare for the levels it will be called at."""
        if not isinstance(levels, Tensor):
            return self
        return replace(self, denoiser=prepare(self.denoiser, self._matched(levels)[0], cond))

    def _matched(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the own level, the factor that goes with `scale`, and the own signal coefficient."""
        size = float(self.scale.double().abs().log().mean().exp())
        alpha, sigma = self.other.alpha(t), self.other.sigma(t)
        # As in `ProcessView`: pure noise has an infinite ratio, for which the noisiest own level stands in.
        level = self.own.level_at(size * sigma / alpha).clamp(max=self.own.noisiest)
        own_alpha, own_sigma = self.own.alpha(level), self.own.sigma(level)
        return level, torch.where(sigma > alpha, own_sigma / (size * sigma), own_alpha / alpha), own_alpha


def one_scale(scale: Tensor, tolerance: float) -> bool:
    """Return whether all components of `scale` are the same number up to a relative `tolerance`."""
    size = scale.double()
    mean = size.log().mean().exp() if bool((size > 0).all()) else size.mean()
    return bool(mean != 0) and float((size / mean - 1).abs().max()) <= tolerance
