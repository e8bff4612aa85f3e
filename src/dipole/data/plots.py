"""Pictures of a dataset (extra `report`): lengths, action histograms, trajectories, what the cameras see."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import ACTION
from dipole.errors import MissingExtraError

_MOST_PANELS = 32
_EPISODES_DRAWN = 5


def plot(episodes: Episodes, report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw a dataset into a folder.

    Args:
        episodes: The data.
        report: What `inspection.inspect` says about it.
        folder: Where to; made if need be.

    Returns:
        The files: `lengths.png`, `actions.png`, `trajectories.png`, and `cameras.png` when there are pictures.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"lengths.png": _lengths(pyplot, episodes)}
    if report["actions"]:
        drawings["actions.png"] = _actions(pyplot, report["actions"])
        drawings["trajectories.png"] = _trajectories(pyplot, episodes)
    if any(feature.is_image for feature in episodes.features.values()):
        drawings["cameras.png"] = _cameras(pyplot, episodes)
    for name, figure in drawings.items():
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
    return [folder / name for name in drawings]


def _lengths(pyplot: ModuleType, episodes: Episodes) -> Any:
    figure, axis = pyplot.subplots(figsize=(6, 3))
    axis.hist(episodes.lengths, bins=min(40, max(5, episodes.num_episodes)))
    axis.set(xlabel="frames", ylabel="episodes", title="episode lengths")
    return figure


def _panels(pyplot: ModuleType, count: int) -> tuple[Any, list[Any]]:
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.1 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _actions(pyplot: ModuleType, histograms: list[dict[str, Any]]) -> Any:
    shown = histograms[:_MOST_PANELS]
    figure, axes = _panels(pyplot, len(shown))
    for axis, row in zip(axes, shown, strict=True):
        edges = np.linspace(
            row["low"], row["high"] if row["high"] > row["low"] else row["low"] + 1, len(row["counts"]) + 1
        )
        axis.stairs(row["counts"], edges, fill=True)
        axis.set_title(f"action {row['name']}", fontsize=9)
    return figure


def _trajectories(pyplot: ModuleType, episodes: Episodes) -> Any:
    dims = min(episodes.features[ACTION].size, _MOST_PANELS)
    figure, axes = _panels(pyplot, dims)
    for number in range(min(_EPISODES_DRAWN, episodes.num_episodes)):
        actions = episodes.episode(number)[ACTION].reshape(int(episodes.lengths[number]), -1)
        for i, axis in enumerate(axes):
            axis.plot(np.arange(len(actions)) / episodes.fps, actions[:, i], linewidth=0.8)
            axis.set_title(f"action {i} over seconds", fontsize=9)
    return figure


def _cameras(pyplot: ModuleType, episodes: Episodes) -> Any:
    keys = [key for key, feature in episodes.features.items() if feature.is_image][:4]
    frames = np.linspace(0, episodes.num_frames - 1, 6).astype(int)
    figure, axes = pyplot.subplots(len(keys), len(frames), figsize=(1.8 * len(frames), 1.9 * len(keys)), squeeze=False)
    for row, key in zip(axes, keys, strict=True):
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(episodes.columns[key][frame].squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
        row[0].set_title(key, fontsize=8, loc="left")
    return figure
