"""The held-out denoising loss: the same windows, levels and noise each time, so that its changes mean something."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dipole.training.batches import Source, to_tensors
from dipole.training.draws import ShardedDraws
from dipole.training.precision import PrecisionName, autocast
from dipole.training.seeding import generator


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

    @torch.inference_mode()
    def __call__(self, policy: Any) -> float:
        """Return the mean loss of a policy in evaluation mode."""
        total = 0.0
        for number, indices in enumerate(self.batches):
            batch = to_tensors(self.source.batch(indices), self.device)
            noise = generator(self.seed, "validation", number)
            with ShardedDraws(noise, 0, 1, len(indices)), autocast(self.device, self.precision):
                total += float(policy.loss(batch, noise)) * len(indices)
        return total / sum(len(indices) for indices in self.batches)
