"""Datasets: episodes, training windows, normalization, and the formats people already have."""

from dipole.data.episodes import Episodes
from dipole.data.features import Feature
from dipole.data.loading import load
from dipole.data.normalizer import Normalizer
from dipole.data.streaming import Streaming
from dipole.data.windows import Windows, split_episodes

__all__ = ["Episodes", "Feature", "Normalizer", "Streaming", "Windows", "load", "split_episodes"]
