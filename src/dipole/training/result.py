"""What a training run reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipole.training.precision import PrecisionName

Evaluate = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far: by the largest `score` in the environment if there is one, else `val_loss`."""

    metric: str
    value: float
    step: int

    def beats(self, other: Best) -> bool:
        """Return whether this is better than `other`, measured the same way."""
        return self.value > other.value if self.metric == "score" else self.value < other.value


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    Attributes:
        out: Its folder.
        steps: Updates done in all.
        seconds: Time they took, over all resumptions.
        loss: Mean training loss of the last log interval.
        val_loss: Last held-out loss; None without held-out episodes.
        best: The best checkpoint; None if nothing was measured.
        samples_per_s: Windows per second of this call, everything included.
        precision: Precision used.
        resumed_from: Update this call started at.
    """

    out: Path
    steps: int
    seconds: float
    loss: float
    val_loss: float | None
    best: Best | None
    samples_per_s: float
    precision: PrecisionName
    resumed_from: int
