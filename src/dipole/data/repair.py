"""Mending a dataset: a new set without the episodes that spoil training, and a list of what is different."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.inspection import copies
from dipole.errors import DipoleError


@dataclass(frozen=True)
class Change:
    """One difference between the old set and the new one.

    Attributes:
        kind: `dropped_not_finite` or `dropped_copy`.
        episode: Number of the episode in the old set.
        text: One line for people.
    """

    kind: str
    episode: int
    text: str


def plan(episodes: Episodes) -> list[Change]:
    """Return what must be changed, by episode: values that are not finite, and copies, pictures included.

    Frames that repeat, constant dimensions and outliers are left alone: they may be what happened.
    """
    changes = _not_finite(episodes)
    gone = {change.episode for change in changes}
    for first, copy in copies(episodes):
        if copy not in gone and first not in gone and _same_pictures(episodes, first, copy):
            changes.append(Change("dropped_copy", copy, f"episode {copy} dropped: a copy of episode {first}"))
    return sorted(changes, key=lambda change: change.episode)


def _not_finite(episodes: Episodes) -> list[Change]:
    found: dict[int, list[str]] = {}
    for key, column in episodes.columns.items():
        if column.dtype.kind != "f":
            continue
        bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
        for episode in np.unique(episodes.episode_index[bad]).tolist():
            frames = int(bad[episodes.starts[episode] : episodes.ends[episode]].sum())
            found.setdefault(episode, []).append(f"{key} in {frames} of {episodes.lengths[episode]} frames")
    return [
        Change("dropped_not_finite", episode, f"episode {episode} dropped: NaN or infinity: {'; '.join(where)}")
        for episode, where in found.items()
    ]


def _same_pictures(episodes: Episodes, first: int, copy: int) -> bool:
    keys = [key for key, feature in episodes.features.items() if feature.is_image]
    one, other = episodes.episode(first), episodes.episode(copy)
    return all(np.array_equal(a, b) for key in keys for a, b in zip(iter(one[key]), iter(other[key]), strict=True))


def repair(episodes: Episodes, out: str | Path) -> list[Change]:
    """Write the mended dataset as a LeRobotDataset v3.0 (pictures as PNG, without loss); the old one is left as it is.

    Args:
        episodes: The dataset, read with `allow_nan=True`.
        out: The folder to write; must not exist, or be empty.

    Returns:
        What was changed; when there is nothing to change, nothing is written.

    Raises:
        DipoleError: `out` is taken, or no episode would be left.
    """
    from dipole.data.formats import lerobot

    changes = plan(episodes)
    if not changes:
        return []
    gone = {change.episode for change in changes}
    kept = [number for number in range(episodes.num_episodes) if number not in gone]
    if not kept:
        raise DipoleError("every episode holds NaN or infinity: there is nothing left to write")
    lerobot.write(episodes.select(kept), out)
    return changes
