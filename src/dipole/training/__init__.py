"""Training: the imitation loop on `accelerate`, exact resumption, EMA, tracking."""

from dipole.training.config import TrainConfig
from dipole.training.imitation import train
from dipole.training.loop import fit
from dipole.training.result import Best, TrainResult
from dipole.training.tracking import read_metrics

__all__ = ["Best", "TrainConfig", "TrainResult", "fit", "read_metrics", "train"]
