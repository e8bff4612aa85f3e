"""Inpainting: some entries of the sample are known (a start state, an executed action, a goal) and are held.

`Inpaint` overrides x0_hat at the known entries: the chain then moves them from noise to their value as if the denoiser
had predicted it, in every process and with every kernel and solver, and the sample ends on it exactly. `hold` returns
a `project` hook for `sample` that overwrites the sample itself: with the clean value (Janner et al. 2022, Diffuser) or
the value noised to the current level (Lugmayr et al. 2022, RePaint). They may be used together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, Processes, prepare
from dipole.diffusion.prediction import add_noise
from dipole.diffusion.tensors import Level, map_parts


@dataclass(frozen=True)
class Inpaint:
    """A denoiser that answers the known values where they are known.

    Attributes:
        denoiser: Answers everywhere else.
        known: Clean values, shaped as the sample (or broadcastable), or parts; parts left out are all unknown.
        mask: True where known, broadcastable to the sample, or parts like `known`.
    """

    denoiser: Denoiser
    known: Any
    mask: Any

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat with the known entries in place, shaped as `x`."""
        return _overwritten(self.denoiser(x, t, cond), self.known, self.mask)

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare the denoiser."""
        return replace(self, denoiser=prepare(self.denoiser, levels, cond))


def hold(known: Any, mask: Any, process: Processes | None = None, noise: Any = None) -> Callable[[Any, Any], Any]:
    """Return `project(x, t)` for `sample`, which overwrites the known entries of the sample.

    Args:
        known: As in `Inpaint`.
        mask: As in `Inpaint`.
        process: With `noise`: write alpha(t) known + sigma(t) noise, so that known and unknown entries are equally
            noisy. Without: write the clean value at every level.
        noise: Standard normal, shaped as `known`; the same at every level.
    """
    if (process is None) != (noise is None):
        raise ValueError("hold needs both a process and noise to write noisy values, or neither to write clean ones")

    def project(x: Any, t: Any) -> Any:
        if process is None:
            return _overwritten(x, known, mask)
        return _overwritten(x, map_parts(add_noise, known, noise, t, process), mask)

    return project


def _overwritten(x: Any, known: Any, mask: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _overwritten(part, known[key], mask[key]) if key in known else part for key, part in x.items()}
    return torch.where(mask, known.to(x), x) if isinstance(known, Tensor) else torch.where(mask, known, x)
