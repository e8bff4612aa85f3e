"""A look at a dataset before training on it: counts, ranges, and the defects that spoil policies silently."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import ACTION, OBSERVATION, SUCCESS, TASK_INDEX, Feature
from dipole.data.normalizer import SMALLEST_RANGE
from dipole.data.statistics import column_stats

BINS = 24
# A value this many times farther from the 1..99 % range than that range is wide is called an outlier.
OUTLIER_FACTOR = 5.0
_SHORT_EPISODE = 16
_CAMERA_FRAMES = 64


@dataclass(frozen=True)
class Finding:
    """Something worth knowing.

    Attributes:
        level: `error`: training will fail or learn nonsense; `warning`: look at it; `note`: just so you know.
        kind: One word for programs.
        text: One line for people.
    """

    level: Literal["error", "warning", "note"]
    kind: str
    text: str


def inspect(episodes: Episodes) -> dict[str, Any]:
    """Return what is in a dataset, as plain Python values (fit for JSON).

    Keys: `num_episodes`, `num_frames`, `fps`, `seconds`, `lengths` (min, median, mean, max), `tasks` (frames of each),
    `success` (episodes that end in success, or None), `features` (per key: dtype, shape, ranges per dimension),
    `actions` (histogram per dimension) and `findings`.
    """
    features = {key: _describe(episodes, key, feature) for key, feature in episodes.features.items()}
    lengths = episodes.lengths
    findings = [
        *_value_findings(features),
        *_repeated_frames(episodes),
        *_repeated_episodes(episodes),
        *_short_episodes(episodes),
        *_still_cameras(episodes),
    ]
    return {
        "num_episodes": episodes.num_episodes,
        "num_frames": episodes.num_frames,
        "fps": float(episodes.fps),
        "seconds": episodes.num_frames / episodes.fps,
        "lengths": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "tasks": _tasks(episodes),
        "success": _successes(episodes),
        "features": features,
        "actions": _histograms(episodes, features),
        "findings": [asdict(finding) for finding in findings],
    }


def _tasks(episodes: Episodes) -> dict[str, int]:
    if TASK_INDEX not in episodes.columns or not episodes.tasks:
        return {}
    counts = np.bincount(episodes.columns[TASK_INDEX][:, 0], minlength=len(episodes.tasks))
    return {task: int(count) for task, count in zip(episodes.tasks, counts, strict=True)}


def _successes(episodes: Episodes) -> int | None:
    if SUCCESS not in episodes.columns:
        return None
    return sum(bool(episode[SUCCESS].any()) for episode in episodes)


def _describe(episodes: Episodes, key: str, feature: Feature) -> dict[str, Any]:
    """Return type and ranges of a column; values that are not finite are counted, and left out of the ranges."""
    row: dict[str, Any] = {"dtype": feature.dtype, "shape": list(feature.shape)}
    row["names"] = list(feature.names) if feature.names else None
    if feature.is_string:
        return row
    column = episodes.columns[key]
    row |= {"not_finite": 0, "first_not_finite": None}
    if column.dtype.kind == "f":
        finite = np.isfinite(column).reshape(len(column), -1).all(1)
        row["not_finite"] = int((~finite).sum())
        if not finite.all():
            frame = int(finite.argmin())
            episode = int(episodes.episode_index[frame])
            row["first_not_finite"] = [episode, int(frame - episodes.starts[episode])]
            column = column[finite]
    if not len(column):
        return row
    stats = column_stats(column, feature, key)
    names = ("min", "max", "mean", "std", "q01", "q99")
    return row | {name: stats[name].reshape(-1).tolist() for name in names}


def _value_findings(features: dict[str, dict[str, Any]]) -> list[Finding]:
    findings = []
    for key, row in features.items():
        if row.get("not_finite"):
            episode, frame = row["first_not_finite"]
            text = f"{key}: {row['not_finite']} frames with NaN or infinity, first in episode {episode}, frame {frame}"
            findings.append(Finding("error", "not_finite", text))
        if "min" not in row or not (key == ACTION or key.startswith(OBSERVATION)) or row["dtype"] in ("image", "video"):
            continue
        low, high, q01, q99 = (np.array(row[name]) for name in ("min", "max", "q01", "q99"))
        constant = np.flatnonzero(high - low < SMALLEST_RANGE)
        if len(constant):
            text = f"{key}: constant in dimensions {_numbers(constant)} of {len(low)}: they carry nothing"
            findings.append(Finding("warning", "constant", text))
        width = np.maximum(q99 - q01, SMALLEST_RANGE)
        far = np.flatnonzero(np.maximum(q01 - low, high - q99) > OUTLIER_FACTOR * width)
        far = np.setdiff1d(far, constant)
        if len(far):
            text = f"{key}: outliers in dimensions {_numbers(far)}: with min-max scaling the rest is squeezed"
            findings.append(Finding("warning", "outliers", f"{text}; look at them, or use mode quantiles"))
    return findings


def _numbers(indices: np.ndarray) -> str:
    text = ", ".join(str(int(i)) for i in indices[:8])
    return text + (f", ... ({len(indices)} in all)" if len(indices) > 8 else "")


def _low_dim(episodes: Episodes) -> list[str]:
    """Return the keys of observations and actions that are numbers."""
    return [
        key
        for key, feature in episodes.features.items()
        if (key == ACTION or key.startswith(OBSERVATION)) and not (feature.is_image or feature.is_string)
    ]


def _repeated_frames(episodes: Episodes) -> list[Finding]:
    """Count frames whose numbers all equal those of the frame before."""
    keys = _low_dim(episodes)
    if not keys or episodes.num_frames < 2:
        return []
    same = np.ones(episodes.num_frames - 1, dtype=bool)
    for key in keys:
        column = episodes.columns[key].reshape(episodes.num_frames, -1)
        same &= (column[1:] == column[:-1]).all(1)
    same[episodes.ends[:-1] - 1] = False
    count = int(same.sum())
    if not count:
        return []
    share = count / episodes.num_frames
    text = f"{count} frames ({share:.1%}) repeat the frame before them: nothing moved, or frames were recorded twice"
    return [Finding("warning" if share > 0.05 else "note", "repeated_frames", text)]


def copies(episodes: Episodes) -> list[tuple[int, int]]:
    """Return (first, copy) of the episodes whose observed numbers and actions equal those of an earlier one."""
    keys = _low_dim(episodes)
    if not keys:
        return []
    seen: dict[bytes, int] = {}
    twins = []
    for number, episode in enumerate(episodes):
        digest = hashlib.sha256()
        for key in keys:
            digest.update(np.ascontiguousarray(episode[key]).tobytes())
        first = seen.setdefault(digest.digest(), number)
        if first != number:
            twins.append((first, number))
    return twins


def _repeated_episodes(episodes: Episodes) -> list[Finding]:
    twins = copies(episodes)
    if not twins:
        return []
    text = f"{len(twins)} episodes are copies of others, first {twins[0][1]} of {twins[0][0]}: a validation split leaks"
    return [Finding("warning", "repeated_episodes", text)]


def _short_episodes(episodes: Episodes) -> list[Finding]:
    short = np.flatnonzero(episodes.lengths < _SHORT_EPISODE)
    if not len(short):
        return []
    text = f"{len(short)} episodes have fewer than {_SHORT_EPISODE} frames (the usual pred_horizon): {_numbers(short)}"
    return [Finding("note", "short_episodes", text)]


def _still_cameras(episodes: Episodes) -> list[Finding]:
    """Look at evenly spaced pictures of each camera: all alike, or all of one colour."""
    findings = []
    for key in (key for key, feature in episodes.features.items() if feature.is_image):
        frames = np.unique(np.linspace(0, episodes.num_frames - 1, _CAMERA_FRAMES).round().astype(int))
        pictures = episodes.columns[key][frames]
        if len(frames) > 1 and (pictures == pictures[:1]).all():
            findings.append(Finding("error", "still_camera", f"{key}: {len(frames)} sampled pictures are all the same"))
        elif int((pictures.reshape(len(frames), -1).std(1) < 1).sum()) > len(frames) // 2:
            findings.append(Finding("warning", "blank_camera", f"{key}: most pictures are of a single colour"))
    return findings


def _histograms(episodes: Episodes, features: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return per action dimension `name, low, high, counts` of `BINS` equal bins over its range."""
    row = features.get(ACTION)
    if row is None or "min" not in row:
        return []
    column = episodes.columns[ACTION].reshape(episodes.num_frames, -1)
    histograms = []
    for i in range(column.shape[1]):
        values = np.asarray(column[:, i], dtype=np.float64)
        low, high = row["min"][i], row["max"][i]
        counts, _ = np.histogram(values[np.isfinite(values)], bins=BINS, range=(low, high if high > low else low + 1))
        name = row["names"][i] if row["names"] else str(i)
        histograms.append({"name": name, "low": low, "high": high, "counts": counts.tolist()})
    return histograms
