"""Minari datasets (HDF5, Arrow and Parquet storage): reading; writing is in `minari_write`.

Minari stores T + 1 observations for T actions. `Episodes` holds the T frames at which an action was taken; the last
observation of every episode, the infos after the last step, seeds, options and the dataset's metadata are kept in
`MinariExtras`, so that writing both gives the same dataset again.

    observations            observation.*        see `minari_spaces`
    actions                 action, action.*
    rewards                 next.reward
    terminations            next.done
    truncations             next.truncated
    infos/<path>            info.<path>          infos[t], as they were when observation t was made
    infos/success           next.success too     infos[t + 1], shifted to the step that led there

Minari does not know a frame rate: 10 per second is assumed. Pictures may be stored as JPEG: they are decoded here, and
written back as plain arrays, so nothing is lost twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import REWARD, SUCCESS, Feature
from dipole.data.formats import minari_spaces
from dipole.data.formats.files import check_chosen, check_finite, read_json
from dipole.data.formats.minari_arrow import ArrowStore
from dipole.data.formats.minari_extras import INFO, SERIES, MinariExtras
from dipole.data.formats.minari_hdf5 import Hdf5Store
from dipole.data.formats.minari_store import Store
from dipole.data.formats.minari_write import write
from dipole.data.storage import allocate
from dipole.errors import DipoleError

__all__ = ["MinariExtras", "read", "read_with_extras", "write"]

FPS = 10.0
_SUCCESS_INFOS = (("success",), ("is_success",))


def read(
    path: str | Path,
    episodes: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    images: bool = True,
    allow_nan: bool = False,
    fps: float = FPS,
) -> Episodes:
    """Read a Minari dataset.

    Args:
        path: Its folder (the one with `data`, or `data` itself).
        episodes: Which episodes, in that order; None reads all.
        keys: Which features; None reads all.
        images: Whether to read pictures.
        allow_nan: Whether NaN and infinity are let through.
        fps: Frames per second.

    Raises:
        DipoleError: The dataset is incomplete, damaged, or uses spaces that are no arrays.
    """
    return read_with_extras(path, episodes, keys, images, allow_nan, fps)[0]


def read_with_extras(
    path: str | Path,
    episodes: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    images: bool = True,
    allow_nan: bool = False,
    fps: float = FPS,
) -> tuple[Episodes, MinariExtras]:
    """Read a Minari dataset and what `Episodes` has no place for; the arguments are those of `read`."""
    path = Path(path)
    folder = path / "data" if (path / "data").is_dir() else path
    metadata = read_json(folder / "metadata.json")
    with _open(folder, metadata) as store:
        chosen = _chosen(store, metadata, episodes)
        plan = _plan(store, metadata, chosen[0], keys, images)
        lengths = [_length(store, number) for number in chosen]
        _check_steps(store, metadata, chosen, lengths)
        columns, finals = _fill(store, plan, chosen, lengths)
        notes = [store.attributes(number) for number in chosen]
    features = {part.key: part.feature for part in plan}
    ends = np.cumsum(lengths)
    if not allow_nan:
        for key, feature in features.items():
            check_finite(columns[key], key, feature, ends, store.source)
            if key in finals:
                check_finite(finals[key], f"{key} (last)", feature, np.arange(1, len(ends) + 1), store.source)
    return Episodes(features, columns, ends, fps), MinariExtras(metadata, notes, finals)


def _open(folder: Path, metadata: dict[str, Any]) -> Hdf5Store | ArrowStore:
    kind = metadata.get("data_format", "hdf5")
    jpeg = bool(metadata.get("jpeg_encoding", True))
    if kind == "hdf5":
        return Hdf5Store(folder, jpeg)
    if kind in ("arrow", "parquet"):
        return ArrowStore(folder, jpeg, kind)
    raise DipoleError(
        f"{folder / 'metadata.json'}: data_format is {str(kind)[:40]!r}: hdf5, arrow and parquet can be read"
    )


def _chosen(store: Store, metadata: dict[str, Any], episodes: Sequence[int] | None) -> list[int]:
    numbers = store.numbers()
    total = metadata.get("total_episodes", len(numbers))
    if numbers != [*range(len(numbers))] or len(numbers) != total:
        raise DipoleError(
            f"{store.source} holds {len(numbers)} episodes, metadata.json announces {str(total)[:20]}: it is incomplete"
        )
    if not numbers:
        raise DipoleError(f"{store.source}: the dataset has no episodes")
    if episodes is None:
        return numbers
    return check_chosen(episodes, len(numbers), store.source)


@dataclass(frozen=True)
class _Part:
    """One column: how to read it from an episode.

    `rows` says which rows are the column: "steps" T of T, "observations" the first T of T + 1, "results" the last T.
    """

    key: str
    feature: Feature
    read: Callable[[int], np.ndarray]
    rows: str = "steps"


def _plan(store: Store, metadata: dict[str, Any], first: int, keys: Sequence[str] | None, images: bool) -> list[_Part]:
    """Return what to read, in the order of `keys`; types are those of the first episode."""
    parts = []
    for group in ("observation", "action"):
        what = f"{group}_space"
        if what not in metadata:
            raise DipoleError(f"{store.source}: metadata.json has no '{what}': write the dataset with a newer Minari")
        space = minari_spaces.parse(metadata[what], what, store.source)
        for leaf in minari_spaces.leaves(space, group, store.source):
            if (keys is None or leaf.key in keys) and (images or not leaf.picture):
                parts.append(_leaf_part(store, group, leaf, first))
    for name, key in SERIES.items():
        kind = np.dtype(np.float64) if key == REWARD else np.dtype(bool)
        if key == REWARD and (keys is None or key in keys):
            kind = store.series(first, name).dtype
        parts.append(_Part(key, Feature(kind.name, (1,)), partial(store.series, name=name)))
    if keys is None or any(key.startswith(INFO) or key == SUCCESS for key in keys):
        parts += _info_parts(store, first)
    if keys is None:
        return parts
    found = {part.key: part for part in parts}
    absent = [key for key in keys if key not in found]
    if absent:
        raise DipoleError(f"{store.source} has no feature '{absent[0]}': it has {', '.join(found)}")
    return [found[key] for key in keys]


def _leaf_part(store: Store, group: str, leaf: minari_spaces.Leaf, first: int) -> _Part:
    found = store.leaf(first, group, leaf)
    if leaf.dtype != "string":
        wanted = np.dtype(leaf.dtype)
        same = found.dtype.kind == wanted.kind or (found.dtype.kind in "iu" and wanted.kind in "iu")
        if not same or found.shape[1:] != leaf.shape:
            raise DipoleError(
                f"{store.source}: '{leaf.key}' is {found.dtype} {found.shape[1:]}, its space says {wanted} {leaf.shape}"
            )
    rows = "observations" if group == "observation" else "steps"
    return _Part(leaf.key, leaf.feature(found.dtype), partial(store.leaf, group=group, leaf=leaf), rows)


def _info_parts(store: Store, first: int) -> list[_Part]:
    parts = []
    for path in store.infos(first):
        values = store.info(first, path)
        dtype = "string" if values.dtype.kind == "U" else values.dtype.name
        feature = Feature(dtype, values.shape[1:] or (1,))
        part = _Part(INFO + ".".join(path), feature, partial(store.info, path=path), "observations")
        parts.append(part)
        if path in _SUCCESS_INFOS and values.ndim == 1 and values.dtype.kind in "bfiu":
            parts.append(_Part(SUCCESS, Feature("bool", (1,)), part.read, "results"))
    names = [part.key for part in parts]
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise DipoleError(
            f"{store.source}: two infos would both be named '{doubled[0]}': choose features with keys=..."
        )
    return parts


def _length(store: Store, number: int) -> int:
    rewards = store.series(number, "rewards")
    if rewards.ndim != 1 or not len(rewards):
        raise DipoleError(
            f"{store.source}: episode {number} has rewards of shape {rewards.shape}: [T] with T > 0 needed"
        )
    return len(rewards)


def _check_steps(store: Store, metadata: dict[str, Any], chosen: list[int], lengths: list[int]) -> None:
    total = metadata.get("total_steps")
    if isinstance(total, int) and len(chosen) == metadata.get("total_episodes") and sum(lengths) != total:
        raise DipoleError(
            f"{store.source} holds {sum(lengths)} steps, metadata.json announces {total}: it is incomplete"
        )


def _fill(
    store: Store, plan: list[_Part], chosen: list[int], lengths: list[int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the columns, and the last values of those that have one row more than there are steps."""
    total = sum(lengths)
    columns: dict[str, Any] = {
        part.key: []
        if part.feature.is_string
        else allocate((total, *part.feature.shape), part.feature.numpy_dtype, f"'{part.key}' of {store.source}")
        for part in plan
    }
    finals: dict[str, list[np.ndarray]] = {part.key: [] for part in plan if part.rows == "observations"}
    start = 0
    for number, length in zip(chosen, lengths, strict=True):
        for part in plan:
            found = part.read(number)
            values = _checked(found, store, part, number, length)[:length]
            if part.key in finals:
                # In its own shape, which tells a number from a vector of one when it is written again.
                finals[part.key].append(found[-1])
            if part.feature.is_string:
                columns[part.key].append(values)
            else:
                columns[part.key][start : start + length] = values
        start += length
    columns = {key: np.concatenate(c) if isinstance(c, list) else c for key, c in columns.items()}
    return columns, {key: _stacked(values, key, store) for key, values in finals.items()}


def _stacked(values: list[np.ndarray], key: str, store: Store) -> np.ndarray:
    if len({value.shape for value in values}) > 1:
        raise DipoleError(f"{store.source}: '{key}' differs in form between episodes: store all in the same form")
    return np.stack(values)


def _checked(values: np.ndarray, store: Store, part: _Part, number: int, length: int) -> np.ndarray:
    """Return an episode's rows of one column as `[T (+ 1), *feature.shape]`, or raise."""
    wanted = length if part.rows == "steps" else length + 1
    where = f"{store.source}: episode {number}, '{part.key}'"
    if values.ndim == 0 or len(values) != wanted:
        raise DipoleError(f"{where} has {len(values) if values.ndim else 0} rows, {wanted} are needed")
    if part.feature.dtype == "bool" and (part.key == SUCCESS or values.dtype.kind in "iu"):
        values = values != 0
    values = values[1:] if part.rows == "results" else values
    shaped = values.reshape(len(values), *part.feature.shape) if values[0].size == part.feature.size else values
    if not (part.feature.accepts(shaped) and values.shape[1:] in (part.feature.shape, part.feature.shape[:-1], ())):
        raise DipoleError(
            f"{where} is {values.dtype} {values.shape[1:]} per row, other episodes have {part.feature.dtype} "
            f"{part.feature.shape}: store all in the same form"
        )
    return shaped
