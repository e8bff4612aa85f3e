"""Minari datasets: writing, in HDF5 storage, such that the `minari` package (0.5) opens the result.

Pictures are written as plain arrays (`jpeg_encoding: false`), losslessly.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import ACTION, DONE, REWARD, SUCCESS, TRUNCATED
from dipole.data.formats import minari_spaces
from dipole.data.formats.files import atomic_folder
from dipole.data.formats.minari_extras import INFO, SERIES, MinariExtras
from dipole.data.formats.minari_spaces import Leaf, Space
from dipole.errors import DipoleError, MissingExtraError

# The version of Minari whose layout this is; the package refuses datasets of versions it does not know.
LAYOUT_VERSION = "0.5.4"
_ROOT_KEYS = ("observation.state", "observation.image")


def write(
    episodes: Episodes,
    path: str | Path,
    extras: MinariExtras | None = None,
    dataset_id: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a Minari dataset.

    Args:
        episodes: What to write: `observation.*`, `action` (or `action.*`), and where present `next.reward`,
            `next.done`, `next.truncated`, `next.success` and `info.*`. Other features have no place in the format.
        path: Folder of the dataset; `data/` is made inside. The `minari` package finds it by name when `path` is
            `<its datasets folder>/<dataset id>`.
        extras: What `read_with_extras` returned: last observations, seeds, spaces and metadata. None makes them up: the
            last observation is repeated, spaces are unbounded, missing rewards are 0, and an episode that does not
            end in `next.done` is truncated.
        dataset_id: Name in the metadata, such as `namespace/name-v0`; None takes that of the extras, or of the folder.
        overwrite: Whether to replace what is at `path`.

    Raises:
        DipoleError: `path` is taken, a feature is missing, or extras and episodes do not belong together.
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtraError("h5py", "data") from None
    path = Path(path)
    spaces = {group: _space(episodes, extras, group) for group in ("observation", "action")}
    leaves = {group: minari_spaces.leaves(space, group, path) for group, space in spaces.items()}
    _check(episodes, leaves["observation"] + leaves["action"], extras)
    with atomic_folder(path, overwrite) as root:
        (root / "data").mkdir()
        file_path = root / "data" / "main_data.hdf5"
        with h5py.File(file_path, "w", track_order=True) as file:
            for index in range(episodes.num_episodes):
                group = file.create_group(f"episode_{index}", track_order=True)
                _write_attributes(group, index, int(episodes.lengths[index]), extras)
                _write_arrays(group, episodes, index, leaves, extras)
        metadata = _metadata(episodes, spaces, extras, dataset_id or _default_id(path, extras))
        metadata["dataset_size"] = round(file_path.stat().st_size / 1e6, 1)
        (root / "data" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def _default_id(path: Path, extras: MinariExtras | None) -> str:
    if extras is not None and isinstance(extras.metadata.get("dataset_id"), str):
        return str(extras.metadata["dataset_id"])
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.name)
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"


def _space(episodes: Episodes, extras: MinariExtras | None, group: str) -> Space:
    if extras is not None:
        what = f"{group}_space"
        return minari_spaces.parse(extras.metadata.get(what), what, Path("the Minari extras"))
    prefix = f"{group}."
    keys = [key for key in episodes.features if key == group or key.startswith(prefix)]
    if not keys:
        raise DipoleError(f"the dataset has no '{prefix}*' feature, which a Minari dataset needs")
    if keys == [ACTION] or (len(keys) == 1 and keys[0] in _ROOT_KEYS):
        return _box(episodes, keys[0])
    if ACTION in keys:
        raise DipoleError(
            "the dataset has 'action' beside 'action.*': Minari needs one of the two, select with keys=..."
        )
    return minari_spaces.nested({tuple(key.removeprefix(prefix).split(".")): _box(episodes, key) for key in keys})


def _box(episodes: Episodes, key: str) -> Space:
    return minari_spaces.box(episodes.features[key])


def _check(episodes: Episodes, leaves: list[Leaf], extras: MinariExtras | None) -> None:
    for leaf in leaves:
        feature = episodes.feature(leaf.key)
        if feature.size != int(np.prod(leaf.shape, dtype=np.int64)):
            raise DipoleError(f"'{leaf.key}' has shape {feature.shape}, its Minari space says {leaf.shape}")
    if extras is None:
        return
    if len(extras.episodes) != episodes.num_episodes:
        raise DipoleError(
            f"there are {episodes.num_episodes} episodes, but the Minari extras are of {len(extras.episodes)}: "
            "write without extras, or load all episodes"
        )
    for key, values in extras.finals.items():
        if len(values) != episodes.num_episodes:
            raise DipoleError(f"the Minari extras hold {len(values)} last values of '{key}', not one per episode")


def _write_attributes(group: Any, index: int, length: int, extras: MinariExtras | None) -> None:
    noted = {} if extras is None else {k: v for k, v in extras.episodes[index].items() if v is not None}
    for name, value in _flat({**noted, "id": index, "total_steps": length}, ""):
        try:
            group.attrs[name] = value
        except (TypeError, ValueError):
            raise DipoleError(
                f"'{name}' of episode {index} is {value!r:.60}: only numbers and texts can be kept"
            ) from None


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Return nested options under slashed names, as Minari stores them."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = isinstance(value, dict)
        found += _flat(value, f"{prefix}{key}/") if inner else [(f"{prefix}{key}", value)]
    return found


def _write_arrays(
    group: Any, episodes: Episodes, index: int, leaves: dict[str, list[Leaf]], extras: MinariExtras | None
) -> None:
    columns = episodes.episode(index)
    length = int(episodes.lengths[index])
    for leaf in leaves["observation"]:
        rows = _with_final(columns[leaf.key], leaf.key, index, extras)
        _create(group, ("observations", *_names(leaf)), rows.reshape(length + 1, *leaf.shape))
    for leaf in leaves["action"]:
        _create(group, ("actions", *_names(leaf)), columns[leaf.key].reshape(length, *leaf.shape))
    for name, values in _series(columns, length).items():
        _create(group, (name,), values)
    for key in (key for key in columns if key.startswith(INFO)):
        _create(group, ("infos", *key.removeprefix(INFO).split(".")), _info(columns[key], key, index, extras))
    if SUCCESS in columns and not any(f"{INFO}{name}" in columns for name in ("success", "is_success")):
        _create(group, ("infos", "success"), np.concatenate([[False], columns[SUCCESS][:, 0]]))


def _names(leaf: Leaf) -> list[str]:
    return [f"_index_{part}" if isinstance(part, int) else part for part in leaf.path]


def _with_final(column: np.ndarray, key: str, index: int, extras: MinariExtras | None) -> np.ndarray:
    known = extras is not None and key in extras.finals
    final = extras.finals[key][index] if known and extras is not None else column[-1]
    return np.concatenate([column, np.asarray(final).reshape(1, *column.shape[1:])])


def _info(column: np.ndarray, key: str, index: int, extras: MinariExtras | None) -> np.ndarray:
    """Return an info `[T + 1, ...]`; numbers become `[T + 1]` unless they were `[T + 1, 1]` when read."""
    rows = _with_final(column, key, index, extras)
    flat = extras is None or key not in extras.finals or extras.finals[key].ndim == 1
    return rows[:, 0] if rows.shape[1:] == (1,) and flat else rows


def _series(columns: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    names = {key: name for name, key in SERIES.items()}
    done = columns[DONE][:, 0] if DONE in columns else np.zeros(length, bool)
    reward = columns[REWARD][:, 0] if REWARD in columns else np.zeros(length)
    if TRUNCATED in columns:
        truncated = columns[TRUNCATED][:, 0]
    else:
        # An episode that just stops was cut off: without a flag, its last state would look like any other.
        truncated = np.arange(length) == length - 1 if not done[-1] else np.zeros(length, bool)
    return {names[REWARD]: reward, names[DONE]: done.astype(bool), names[TRUNCATED]: truncated.astype(bool)}


def _create(group: Any, names: tuple[str, ...], values: np.ndarray) -> None:
    import h5py

    for name in names[:-1]:
        group = group.require_group(name)
    if values.dtype.kind == "U":
        kind = h5py.string_dtype("utf-8")
        group.create_dataset(names[-1], data=values.reshape(-1).astype(object), dtype=kind, chunks=True)
        return
    large = values[:1].nbytes >= 1024  # pictures shrink well, a vector of numbers does not
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if large else {}
    group.create_dataset(names[-1], data=values, chunks=True, maxshape=(None, *values.shape[1:]), **options)


def _metadata(
    episodes: Episodes, spaces: dict[str, Space], extras: MinariExtras | None, dataset_id: str
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"minari_version": LAYOUT_VERSION} if extras is None else dict(extras.metadata)
    return metadata | {
        "dataset_id": dataset_id,
        "total_episodes": episodes.num_episodes,
        "total_steps": episodes.num_frames,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(spaces["observation"]),
        "action_space": json.dumps(spaces["action"]),
    }
