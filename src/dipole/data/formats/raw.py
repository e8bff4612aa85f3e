"""Plain arrays without a description (npz, zarr): which feature each one is.

    action(s)                      action
    state(s), obs, observation(s)  observation.state
    img, image(s)                  observation.image
    reward(s)                      next.reward
    terminal(s), done(s)           next.done
    timeout(s), truncat...         next.truncated
    success(es)                    next.success
    any other NAME                 observation.NAME (pictures: observation.images.NAME)

Only arrays with one row per frame become columns. float64 becomes float32, flags become bool, pictures become uint8
(H, W, C). Plain arrays do not tell their frame rate: 10 per second is assumed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dipole.data import pusht
from dipole.data.episodes import Episodes, infer_feature
from dipole.data.features import ACTION, DONE, REWARD, SUCCESS, TRUNCATED
from dipole.data.formats.files import check_finite
from dipole.data.storage import allocate
from dipole.errors import DipoleError

FPS = 10.0

_NAMES = {
    ACTION: ("action", "actions"),
    "observation.state": ("state", "states", "obs", "observation", "observations"),
    "observation.image": ("img", "image", "images"),
    REWARD: ("reward", "rewards"),
    DONE: ("terminal", "terminals", "terminated", "terminations", "done", "dones"),
    TRUNCATED: ("timeout", "timeouts", "truncated", "truncations"),
    SUCCESS: ("success", "successes"),
}
_FEATURE_OF = {name: key for key, names in _NAMES.items() for name in names}
# The names that are known to hold one row per frame.
NAMED = frozenset(_FEATURE_OF)
_FLAGS = (DONE, TRUNCATED, SUCCESS)
_CHUNK_ROWS = 256


def to_episodes(
    columns: dict[str, np.ndarray], ends: np.ndarray, source: Path, fps: float | None = None, allow_nan: bool = False
) -> Episodes:
    """Return the episodes of plain columns; the published Push-T sets get the simulator's observation (see `pusht`).

    Args:
        columns: `[N, ...]` per name, one row per frame.
        ends: Exclusive end of each episode.
        source: The file, for errors.
        fps: Frames per second; None takes 10.
        allow_nan: Whether NaN and infinity are let through.
    """
    ends = _checked_ends(ends, columns, source)
    if pusht.is_pusht(columns):
        columns = {key: column for key, column in columns.items() if key in ("state", "action", "img")}
        if "img" in columns:
            columns["img"] = _pictures(columns["img"], "img", source)
        episodes = pusht.from_raw(columns, ends)
    else:
        named: dict[str, np.ndarray] = {}
        for name, column in columns.items():
            key = _feature_name(name, column)
            if key in named:
                raise DipoleError(f"{source} has two arrays that mean '{key}', one is '{name}': rename one of them")
            named[key] = _converted(column, key, source)
        features = {key: infer_feature(key, column) for key, column in named.items()}
        episodes = Episodes(features, named, ends, FPS if fps is None else fps)
    if not allow_nan:
        for key, feature in episodes.features.items():
            check_finite(episodes.columns[key], key, feature, ends, source)
    return episodes


def _checked_ends(ends: np.ndarray, columns: dict[str, np.ndarray], source: Path) -> np.ndarray:
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or len(ends) == 0:
        raise DipoleError(f"{source}: the ends of the episodes are {ends.dtype} {ends.shape}: whole numbers [E] needed")
    ends = ends.astype(np.int64)
    if ends[0] <= 0 or (np.diff(ends) <= 0).any():
        raise DipoleError(f"{source}: the ends of the episodes do not rise: the file is damaged")
    for name, column in columns.items():
        if len(column) != ends[-1]:
            raise DipoleError(f"{source}: '{name}' has {len(column)} rows, but the episodes have {ends[-1]} frames")
    if not columns:
        raise DipoleError(f"{source} has no array with one row per frame")
    return ends


def _is_picture(name: str, column: np.ndarray) -> bool:
    return column.ndim == 4 and (_FEATURE_OF.get(name) == "observation.image" or column.dtype == np.uint8)


def _feature_name(name: str, column: np.ndarray) -> str:
    if name in _FEATURE_OF:
        return _FEATURE_OF[name]
    name = name.replace("/", ".")
    return f"observation.images.{name}" if _is_picture(name, column) else f"observation.{name}"


def _converted(column: np.ndarray, key: str, source: Path) -> np.ndarray:
    if key.startswith("observation.image") and column.ndim == 4:
        return _pictures(column, key, source)
    column = column[:, None] if column.ndim == 1 else column
    if key in _FLAGS:
        return column.astype(bool)
    return column.astype(np.float32) if column.dtype in (np.float64, np.float16) else column


def _pictures(column: np.ndarray, key: str, source: Path) -> np.ndarray:
    """Return pictures as uint8 [N, H, W, C]; floats must be whole numbers 0..255, or lie in [0, 1]."""
    if column.shape[1] in (1, 3) and column.shape[3] not in (1, 3):
        column = np.moveaxis(column, 1, 3)
    if column.dtype == np.uint8:
        return np.ascontiguousarray(column)
    if column.dtype.kind != "f":
        raise DipoleError(f"{source}: '{key}' is {column.dtype}: pictures must be uint8, or float")
    out = allocate(column.shape, np.dtype(np.uint8), f"'{key}' of {source}")
    scale = 255.0 if _chunk_max(column) <= 1.0 else 1.0
    for start in range(0, len(column), _CHUNK_ROWS):
        chunk = column[start : start + _CHUNK_ROWS] * scale
        whole = np.rint(chunk)
        if not (chunk.min() >= 0 and chunk.max() <= 255 and (scale > 1 or np.array_equal(whole, chunk))):
            raise DipoleError(f"{source}: '{key}' holds neither whole numbers 0..255 nor numbers in [0, 1]")
        out[start : start + _CHUNK_ROWS] = whole
    return out


def _chunk_max(column: np.ndarray) -> float:
    return max(float(column[i : i + _CHUNK_ROWS].max()) for i in range(0, len(column), _CHUNK_ROWS))
