"""One denoiser seen in another process: sample a flow policy with DDPM, compose a flow with a diffusion policy.

All Gaussian processes are the same up to scale at equal noise-to-signal ratio r = sigma / alpha: if own x_t has
coefficients (alpha, sigma) and the other x_u has (alpha', sigma') with sigma/alpha = sigma'/alpha', then
x_t / alpha = x_u / alpha', and both have the same expected clean sample. So

    D_other(x, u) = D_own(x alpha(t) / alpha'(u), t)    with    t = own.level_at(sigma'(u) / alpha'(u)).

Exact when the own process has continuous levels; rounded to the nearest trained level for `VP`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, prepare
from dipole.diffusion.process import LevelLike, Process
from dipole.diffusion.tensors import Level, expand, scaled


@dataclass(frozen=True)
class ProcessView:
    """A denoiser of process `own`, usable by samplers of process `other`.

    Attributes:
        denoiser: Denoiser of `own`.
        own: Process the denoiser was trained in.
        other: Process it is called in.
    """

    denoiser: Denoiser
    own: Process
    other: Process

    def __call__(self, x: Tensor, t: LevelLike, cond: Any = None) -> Tensor:
        """Return x0_hat for `x` `[B, ...]` at level `t` of `other`."""
        if not isinstance(t, Tensor):
            number, factor = _matched_number(self.own, self.other, float(t))
            return self.denoiser(scaled(x, factor), number, cond)
        level, scale = _matched(self.own, self.other, t)
        return self.denoiser(x * expand(scale, x).to(x), level, cond)

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Let the denoiser prepare for the levels it will be called at."""
        if not isinstance(levels, Tensor):
            return self
        own_levels, _ = _matched(self.own, self.other, levels)
        return ProcessView(prepare(self.denoiser, own_levels, cond), self.own, self.other)


def _matched(own: Process, other: Process, t: LevelLike) -> tuple[Tensor, Tensor]:
    """Return the own level with the ratio of the other level `t`, and the scale from other to own samples."""
    alpha, sigma = other.alpha(t), other.sigma(t)
    # Pure noise has an infinite ratio, which not every process reaches: its noisiest level comes closest.
    level = own.level_at(sigma / alpha).clamp(max=own.noisiest)
    own_alpha, own_sigma = own.alpha(level), own.sigma(level)
    return level, torch.where(sigma > alpha, own_sigma / sigma, own_alpha / alpha)


@lru_cache(maxsize=4096)
def _matched_number(own: Process, other: Process, t: float) -> tuple[float, float]:
    level, scale = _matched(own, other, torch.tensor(t, dtype=torch.float64))
    return float(level), float(scale)
