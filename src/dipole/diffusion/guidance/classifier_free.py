"""Classifier-free guidance: extrapolate from the unconditional denoiser towards the conditional one.

Source: Ho & Salimans 2022, in the form  D = D_u + scale (D_c - D_u);  scale 1 is conditional sampling, 0 unconditional.
(Papers that write (1 + w) D_c - w D_u mean scale = 1 + w.) The result is not the density p_u^(1-scale) p_c^scale.
Conditioning is a dict of tensors with the batch first; to drop a key is to set it to zero, in training as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from dipole.diffusion.denoiser import Denoiser, prepare
from dipole.diffusion.tensors import Level, expand, map_parts, rows

Cond = Mapping[str, Tensor]
DropMode = Literal["per_sample", "per_element"]


def drop_conditioning(
    cond: Cond, keys: Sequence[str] | None = None, mask: Any = None, mode: DropMode = "per_sample"
) -> dict[str, Tensor]:
    """Return the conditioning with some of it set to zero: what a denoiser sees when it is not told.

    Args:
        cond: Named conditioning sets `[B, ...]`.
        keys: Sets that are dropped; None for all. The others pass unchanged.
        mask: What is dropped, True or 1 where it is; None for everything. `per_sample`: `[B]`, whole rows of all
            keys together, which is what classifier-free guidance needs. `per_element`: a dict of masks shaped as the
            sets, single features (BESO's published code).
        mode: See `mask`.

    Raises:
        ValueError: A key is not in `cond`, or the mode is unknown.
    """
    chosen = list(cond) if keys is None else list(keys)
    missing = [key for key in chosen if key not in cond]
    if missing:
        raise ValueError(f"conditioning has no '{missing[0]}' to drop; it has: {', '.join(cond)}")
    if mode not in ("per_sample", "per_element"):
        raise ValueError(f"unknown mode '{mode}': per_sample or per_element")
    kept = dict(cond)
    for key in chosen:
        if mask is None:
            kept[key] = torch.zeros_like(cond[key])
        else:
            drop = expand(mask, cond[key]) if mode == "per_sample" else mask[key]
            kept[key] = cond[key].masked_fill(drop.to(cond[key].device).bool(), 0.0)
    return kept


def random_drop(
    cond: Cond,
    probability: float,
    keys: Sequence[str] | None = None,
    mode: DropMode = "per_sample",
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """Return the conditioning of a training batch, dropped at random with `probability` (see `drop_conditioning`)."""
    chosen = list(cond) if keys is None else list(keys)
    if probability <= 0 or not chosen:
        return dict(cond)
    device = None if generator is None else generator.device

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) < probability

    first = next(iter(cond.values()))
    if mode == "per_sample":
        return drop_conditioning(cond, chosen, draw((first.shape[0],)), mode)
    return drop_conditioning(cond, chosen, {key: draw(tuple(cond[key].shape)) for key in chosen}, mode)


@dataclass(frozen=True)
class ClassifierFree:
    """Guidance by the difference between a denoiser with and without some of its conditioning.

    One forward pass at scale 0 and 1; else one of 2B rows, conditional rows first.

    Attributes:
        denoiser: Trained with these keys dropped now and then; `cond` is a dict.
        scale: 0 unconditional, 1 conditional, above 1 extrapolates.
        keys: Conditioning sets that are dropped; None for all.
    """

    denoiser: Denoiser
    scale: float = 1.0
    keys: tuple[str, ...] | None = None

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat, shaped as `x`."""
        return self._denoise(self.denoiser, x, t, self._conditioning(cond))

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare the denoiser for the batch it will be called with."""
        conditioning = self._conditioning(cond)
        if self.scale not in (0.0, 1.0):
            first = next(iter(cond.values()))
            levels = map_parts(lambda part: _twice_levels(part, first.shape[0]), levels)
        return _PreparedClassifierFree(self, prepare(self.denoiser, levels, conditioning), conditioning)

    def _conditioning(self, cond: Cond) -> Cond:
        """Return what the denoiser is called with: `[B]` rows at scale 0 and 1, else `[2B]`."""
        if cond is None:
            raise ValueError("classifier-free guidance needs conditioning, a dict of tensors")
        if self.scale == 1:
            return cond
        dropped = drop_conditioning(cond, self.keys)
        if self.scale == 0:
            return dropped
        return {key: torch.cat([value, dropped[key]]) for key, value in cond.items()}

    def _denoise(self, denoiser: Denoiser, x: Any, t: Any, conditioning: Cond) -> Any:
        if self.scale in (0.0, 1.0):
            return denoiser(x, t, conditioning)
        both = denoiser(map_parts(_twice, x), _twice_level(t, x), conditioning)
        return map_parts(self._extrapolated, both)

    def _extrapolated(self, both: Tensor) -> Tensor:
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)


@dataclass(frozen=True)
class _PreparedClassifierFree:
    """`ClassifierFree` for one list of levels and one conditioning, whose two versions are made only once."""

    guidance: ClassifierFree
    denoiser: Denoiser
    conditioning: Cond

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        return self.guidance._denoise(self.denoiser, x, t, self.conditioning)


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def _twice_level(t: Any, x: Any) -> Any:
    if isinstance(t, Mapping):
        return {key: _twice_level(level, x[key]) for key, level in t.items()}
    if not isinstance(t, Tensor) or t.dim() == 0:
        return t
    return _twice(rows(t, next(iter(x.values())) if isinstance(x, Mapping) else x))


def _twice_levels(levels: Tensor, batch: int) -> Tensor:
    """Return `[K+1, 2B, ...]` levels for `[K+1, B or 1, ...]` ones; `[K+1]` stays."""
    if levels.dim() == 1:
        return levels
    per_row = levels.expand(levels.shape[0], batch, *levels.shape[2:])
    return torch.cat([per_row, per_row], dim=1)
