"""Statistics of a column, in float64 and in chunks, so that a column larger than memory is no problem.

Numbers: min, max, mean and std over all frames (pooled over chunks, Chan et al. 1979); the quantiles are exact up to a
million frames and taken from evenly spaced frames above. Images: per channel on [0, 1], shape (C, 1, 1), over evenly
spaced frames (N^0.75 of them, between 100 and 10000, as LeRobot samples), exact through a 256-bin histogram.
"""

from __future__ import annotations

import math

import numpy as np

from dipole.data.features import Feature
from dipole.errors import DipoleError

CHUNK_BYTES = 64 * 2**20
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_QUANTILE_FRAMES = 1_000_000
_LEVELS = np.arange(256) / 255.0


def column_stats(column: np.ndarray, feature: Feature, key: str) -> dict[str, np.ndarray]:
    """Return `min, max, mean, std, q01, q10, q50, q90, q99, count` of a column.

    Args:
        column: `[N, *feature.shape]`.
        feature: What it holds.
        key: Its name, for the error.

    Returns:
        float64 arrays of the feature's shape (images: `(C, 1, 1)`); `count` is int64 `[1]`.

    Raises:
        DipoleError: The column holds NaN or infinity.
    """
    if feature.is_image:
        return _image_stats(column)
    return _number_stats(column, key)


def _number_stats(column: np.ndarray, key: str) -> dict[str, np.ndarray]:
    rows = max(1, CHUNK_BYTES // max(1, 8 * math.prod(column.shape[1:])))
    count, mean, square = 0, np.zeros(column.shape[1:]), np.zeros(column.shape[1:])
    low, high = np.full(column.shape[1:], np.inf), np.full(column.shape[1:], -np.inf)
    for start in range(0, len(column), rows):
        chunk = np.asarray(column[start : start + rows], dtype=np.float64)
        if not np.isfinite(chunk).all():
            raise DipoleError(
                f"'{key}' holds NaN or infinity: `dipole inspect` shows where; repair or drop the episode"
            )
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
        chunk_mean = chunk.mean(0)
        delta, total = chunk_mean - mean, count + len(chunk)
        square += ((chunk - chunk_mean) ** 2).sum(0) + delta**2 * (count * len(chunk) / total)
        mean += delta * (len(chunk) / total)
        count = total
    stats = {"min": low, "max": high, "mean": mean, "std": np.sqrt(square / count)}
    return stats | _quantiles(column) | {"count": np.array([count])}


def _quantiles(column: np.ndarray) -> dict[str, np.ndarray]:
    """Return the quantiles, a block of dimensions at a time."""
    frames = column[:: math.ceil(len(column) / _QUANTILE_FRAMES)].reshape(-1, math.prod(column.shape[1:]))
    block = max(1, CHUNK_BYTES // (8 * len(frames)))
    parts = [
        np.quantile(np.asarray(frames[:, i : i + block], dtype=np.float64), list(QUANTILES.values()), axis=0)
        for i in range(0, frames.shape[1], block)
    ]
    values = np.concatenate(parts, axis=1)
    return {name: value.reshape(column.shape[1:]) for name, value in zip(QUANTILES, values, strict=True)}


def _image_stats(column: np.ndarray) -> dict[str, np.ndarray]:
    wanted = min(len(column), max(100, min(int(len(column) ** 0.75), 10_000)))
    frames = np.unique(np.linspace(0, len(column) - 1, wanted).round().astype(np.int64))
    channels = column.shape[-1]
    histogram = np.zeros((channels, 256), dtype=np.int64)
    rows = max(1, CHUNK_BYTES // math.prod(column.shape[1:]))
    for start in range(0, len(frames), rows):
        pictures = column[frames[start : start + rows]]
        for channel in range(channels):
            histogram[channel] += np.bincount(pictures[..., channel].ravel(), minlength=256)
    return {name: value[:, None, None] for name, value in _histogram_stats(histogram).items()} | {
        "count": np.array([len(frames)])
    }


def _histogram_stats(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of values 0..255 / 255 counted in `histogram` [C, 256]."""
    total = histogram.sum(1)
    mean = histogram @ _LEVELS / total
    variance = (histogram * (_LEVELS - mean[:, None]) ** 2).sum(1) / total
    seen = histogram > 0
    stats = {
        "min": _LEVELS[seen.argmax(1)],
        "max": _LEVELS[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(variance),
    }
    cumulative = histogram.cumsum(1)
    for name, quantile in QUANTILES.items():
        stats[name] = _LEVELS[(cumulative > (quantile * (total - 1))[:, None]).argmax(1)]
    return stats
