"""The held-out denoising loss: the same windows, levels and noise each time, so that its changes mean something."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dipole.training.batches import Source, to_tensors
from dipole.training.config import TrainConfig
from dipole.training.draws import ShardedDraws
from dipole.training.precision import PrecisionName, autocast
from dipole.training.seeding import generator

# A held-out window costs about a third of a trained one (no backward pass): with 20 measurements in a run, or one in
# the time of 21 of its own, at most a twentieth of the time goes into measuring.
FORWARD_SHARE = 1 / 3
MEASUREMENTS = 20
_SPACING = 7


def validation_interval(config: TrainConfig, steps: int, batches: int) -> int:
    """Return the updates between two measurements of the held-out loss.

    Args:
        config: Settings; `val_every` if given.
        steps: Updates of the run.
        batches: Batches in one measurement.
    """
    return config.val_every or max(1, steps // MEASUREMENTS, _SPACING * batches)


def is_due(step: int, total: int, every: int) -> bool:
    """Return whether to measure after update `step` of `total`: at every `every`-th and at the end, not just before."""
    return step == total or (step % every == 0 and 2 * (total - step) >= every)


class HeldOutLoss:
    """Measures a policy's loss on held-out windows.

    Args:
        source: The windows.
        most: At most so many, spread evenly.
        batch_size: Windows at a time.
        seed: Seed of levels and noise.
        device: Where the policy is.
        precision: As in training.
    """

    def __init__(
        self, source: Source, most: int, batch_size: int, seed: int, device: torch.device, precision: PrecisionName
    ) -> None:
        self.source, self.seed, self.device, self.precision = source, seed, device, precision
        count = min(len(source), most)
        chosen = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
        self.batches = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]

    @torch.no_grad()
    def __call__(self, policy: Any) -> float:
        """Return the mean loss of a policy in evaluation mode."""
        total = 0.0
        for number, indices in enumerate(self.batches):
            batch = to_tensors(self.source.batch(indices), self.device)
            noise = generator(self.seed, "validation", number)
            with ShardedDraws(noise, 0, 1, len(indices)), autocast(self.device, self.precision):
                total += float(policy.loss(batch, noise)) * len(indices)
        return total / sum(len(indices) for indices in self.batches)
