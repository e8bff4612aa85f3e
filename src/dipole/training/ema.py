"""Exponential moving average of the weights: what is evaluated, saved and acted with."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import nn


def decay_at(k: int, schedule: Literal["constant", "power"], decay: float) -> float:
    """Return the decay of update `k` (0 for the first): 0 at k = 0, so that one update copies the model.

    `constant`: min(k / (k + 9), d), a constant decay after a ramp that averages over about the last ninth of the run
    so far (the schedule of BESO, Reuss et al. 2023, and of TensorFlow): without it the average of a short run lags.
    `power`: min(1 - (1 + k)^-0.75, d) (Diffusion Policy, Chi et al. 2023; its code has d = 0.9999).
    """
    if schedule == "power":
        return min(1 - math.pow(1 + k, -0.75), decay)
    return min(k / (k + 9), decay)


class EMA:
    """Keeps a copy of a module whose parameters follow the module's.

    Attributes:
        module: The averaged copy, in evaluation mode and without gradients.
        updates: Number of updates so far.
    """

    def __init__(self, source: nn.Module, schedule: Literal["constant", "power"] = "constant", decay: float = 0.999):
        self.module: Any = copy.deepcopy(source).eval().requires_grad_(False)
        self.schedule: Literal["constant", "power"] = schedule
        self.decay = decay
        self.updates = 0
        self._average = [parameter.detach() for parameter in self.module.parameters()]
        self._source = [parameter.detach() for parameter in source.parameters()]
        # Buffers (normalizer statistics, tables) are not averaged: the copy follows them exactly.
        self._buffers = list(zip(self.module.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present weights."""
        decay = decay_at(self.updates, self.schedule, self.decay)
        self.updates += 1
        if decay == 0.0:  # an exact copy: lerp with weight 1 may round
            torch._foreach_copy_(self._average, self._source)
        else:
            torch._foreach_lerp_(self._average, self._source, 1 - decay)
        for average, source in self._buffers:
            average.copy_(source)
