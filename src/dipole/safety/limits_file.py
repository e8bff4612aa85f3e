"""Limits from where they are known: a dataset, its statistics, or a file that a person wrote."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dipole.data import Episodes
from dipole.errors import DipoleError
from dipole.safety.limits import Limits
from dipole.serialization import from_dict, read_json, to_dict, write_json


def limits_from_stats(stats: Mapping[str, Mapping[str, np.ndarray]], margin: float = 0.05) -> Limits:
    """Return the box that a dataset's actions lie in, as its statistics say; no rate limit, they do not know it.

    Args:
        stats: As `Episodes.stats` gives; `action` with `min` and `max` is needed.
        margin: How much wider the box is than the data on each side, as a fraction of their range.

    Raises:
        DipoleError: There are no statistics of the actions.
    """
    if margin < 0:
        raise DipoleError(f"the margin must not be negative, got {margin:g}")
    action = stats.get("action", {})
    if "min" not in action or "max" not in action:
        raise DipoleError("there are no min and max of 'action' in the statistics: recompute them from the dataset")
    low, high = (np.asarray(action[name], dtype=np.float64) for name in ("min", "max"))
    room = margin * (high - low)
    return Limits(low=_plain(low - room), high=_plain(high + room))


def limits_from_episodes(episodes: Episodes, margin: float = 0.05) -> Limits:
    """Return the box and the rate limit that a dataset's actions keep.

    Args:
        episodes: Demonstrations; the largest change is looked for within each, not across their borders.
        margin: How much wider than the data the box is on each side (as a fraction of the range), and how much faster
            than the fastest demonstration the rate may be. A dimension that never changes gets the rate of its margin
            in the box, at least 1e-6.

    Raises:
        DipoleError: The dataset has no vectors of actions.
    """
    if "action" not in episodes.columns or episodes.columns["action"].ndim != 2:
        raise DipoleError("limits need a dataset with actions that are vectors, feature 'action'")
    box = limits_from_stats(episodes.stats(), margin)
    actions = np.asarray(episodes.columns["action"], dtype=np.float64)
    change = np.abs(np.diff(actions, axis=0))
    change[np.asarray(episodes.ends[:-1]) - 1] = 0  # from one episode's last action to the next one's first
    fastest = change.max(axis=0, initial=0.0) * (1 + margin)
    room = margin * (actions.max(axis=0) - actions.min(axis=0))
    return replace(box, max_change=_plain(np.where(fastest > 0, fastest, np.maximum(room, 1e-6))))


def read_limits(path: str | Path) -> Limits:
    """Return the limits in a JSON or TOML file; entries that are left out take their defaults.

    Raises:
        DipoleError: The file is missing, not valid, or an entry is unknown or wrong.
    """
    path = Path(path)
    table = _read_toml(path) if path.suffix == ".toml" else read_json(path)
    if not isinstance(table, dict):
        raise DipoleError(f"{path}: expected a table of limits")
    try:
        return from_dict(Limits, {**to_dict(Limits()), **table}, "limits")
    except DipoleError as error:
        raise DipoleError(f"{path}: {error}") from None


def write_limits(limits: Limits, path: str | Path) -> None:
    """Write limits as JSON, atomically."""
    write_json(Path(path), to_dict(limits))


def _read_toml(path: Path) -> object:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DipoleError(f"{path}: no such file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DipoleError(f"{path}: not valid TOML ({error})") from None


def _plain(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
