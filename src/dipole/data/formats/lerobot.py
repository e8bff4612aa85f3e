"""LeRobotDataset v3.0, v2.1 and v2.0: reading; writing is in `lerobot_write`.

A folder with `meta/info.json`, parquet tables of frames, pictures inside the tables (PNG) or in video files. Versions
differ in how many episodes share a file and in the form of the tables of episodes and tasks (`lerobot_layout`).

Reading is strict: what is missing, cut short, of another type or shape, or not finite is an error that names the file
and the key. Memory: tables are read a few frames at a time into the columns, which go to disk when they are large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import TASK_INDEX, Feature
from dipole.data.formats import lerobot_layout, lerobot_stream
from dipole.data.formats.files import check_finite
from dipole.data.formats.lerobot_layout import Entry, Layout
from dipole.data.formats.lerobot_table import Table, open_parquet
from dipole.data.formats.lerobot_write import write
from dipole.data.storage import allocate
from dipole.data.streaming import Streaming
from dipole.errors import DipoleError

__all__ = ["read", "write"]

_BATCH_ROWS = 2048
_IMAGE_BATCH_ROWS = 64
_RATE_TOLERANCE = 0.1


def read(
    path: str | Path,
    episodes: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    images: bool = True,
    allow_nan: bool = False,
    stream: Streaming | None = None,
) -> Episodes:
    """Read a LeRobotDataset.

    Args:
        path: Its folder (the one with `meta`).
        episodes: Which episodes, in that order; None reads all.
        keys: Which features; None reads all.
        images: Whether to read pictures and videos.
        allow_nan: Whether NaN and infinity are let through.
        stream: Leave pictures and videos in their files and decode them when asked for, in this way. Damage to one of
            them is then found when it is asked for.

    Raises:
        DipoleError: The dataset is incomplete, damaged, or of an unknown version.
    """
    layout = lerobot_layout.read(Path(path))
    entries = _chosen(layout, episodes)
    features = _chosen_features(layout, keys, images)
    _check_rows(entries)
    _check_videos(entries, features)
    ends = np.cumsum([entry.length for entry in entries])
    times = np.full(int(ends[-1]), np.nan)
    streamed = {} if stream is None else lerobot_stream.columns(entries, ends, features, times, stream)
    columns = {
        key: allocate((int(ends[-1]), *feature.shape), feature.numpy_dtype, f"'{key}' of {path}")
        for key, feature in features.items()
        if not feature.is_string and key not in streamed
    }
    texts = {key: np.empty(int(ends[-1]), dtype=object) for key, feature in features.items() if feature.is_string}
    stores = {key: column.source for key, column in streamed.items() if features[key].dtype == "image"}
    _read_tables(layout, entries, ends, features, columns | texts | stores, times)
    for key, values in texts.items():
        columns[key] = values.astype(np.str_)[:, None]
    _read_videos(entries, ends, {key: features[key] for key in columns}, columns, times)
    columns |= cast("dict[str, np.ndarray]", streamed)
    if TASK_INDEX in columns:
        columns[TASK_INDEX] = _renumber(columns[TASK_INDEX], layout)
    if not allow_nan:
        for key, feature in features.items():
            check_finite(columns[key], key, feature, ends, Path(path))
    ordered = {key: columns[key] for key in features}
    return Episodes(features, ordered, ends, layout.fps, tuple(layout.tasks.values()))


def _chosen(layout: Layout, episodes: Sequence[int] | None) -> list[Entry]:
    if episodes is None:
        return layout.entries
    known = {entry.index: entry for entry in layout.entries}
    absent = [int(index) for index in episodes if int(index) not in known]
    if absent:
        raise DipoleError(f"{layout.root} has no episode {absent[0]}: it has {len(known)}, from 0")
    if len({int(index) for index in episodes}) != len(episodes):
        raise DipoleError("the same episode was asked for twice: name each once")
    if not len(episodes):
        raise DipoleError("no episode was asked for: name at least one")
    return [known[int(index)] for index in episodes]


def _chosen_features(layout: Layout, keys: Sequence[str] | None, images: bool) -> dict[str, Feature]:
    if keys is not None:
        for key in keys:
            if key not in layout.features:
                raise DipoleError(f"{layout.info} has no feature '{key}': it has {', '.join(layout.features)}")
    chosen = list(layout.features) if keys is None else list(keys)
    return {key: layout.features[key] for key in chosen if images or not layout.features[key].is_image}


def _check_rows(entries: Sequence[Entry]) -> None:
    """Refuse lengths that the files cannot hold before any memory is taken for them."""
    per_file: dict[Path, int] = {}
    for entry in entries:
        per_file[entry.data] = per_file.get(entry.data, 0) + entry.length
    for path, wanted in per_file.items():
        rows = open_parquet(path).metadata.num_rows
        if rows < wanted:
            raise DipoleError(f"{path} has {rows} rows, but its episodes should have {wanted}: download it again")


def _check_videos(entries: Sequence[Entry], features: dict[str, Feature]) -> None:
    for key in (key for key, feature in features.items() if feature.dtype == "video"):
        if key in entries[0].depth:
            raise DipoleError(f"'{key}' is a depth video, which is not supported: leave it out with keys=...")
        for path in dict.fromkeys(entry.videos[key][0] for entry in entries):
            if not path.is_file():
                raise DipoleError(
                    f"{path} is missing: download the dataset again, or leave pictures out (images=False, --no-images)"
                )


def _read_tables(
    layout: Layout,
    entries: Sequence[Entry],
    ends: np.ndarray,
    features: dict[str, Feature],
    out: Mapping[str, Any],
    times: np.ndarray,
) -> None:
    """Fill `out` and the time of every frame, float64 [N], from the tables."""
    in_table = {key: feature for key, feature in features.items() if feature.dtype != "video"}
    offset = np.full(max(entry.index for entry in layout.entries) + 1, -1, dtype=np.int64)
    length = np.zeros(len(offset), dtype=np.int64)
    for entry, end in zip(entries, ends, strict=True):
        offset[entry.index], length[entry.index] = end - entry.length, entry.length
    packed = [key for key, feature in in_table.items() if feature.is_image and not isinstance(out[key], np.ndarray)]
    filled = 0
    for path in dict.fromkeys(entry.data for entry in entries):
        table = Table(path, in_table, packed)
        rows_at_once = _IMAGE_BATCH_ROWS if any(f.is_image for f in in_table.values()) else _BATCH_ROWS
        for batch in table.batches(rows_at_once):
            episode, frame = batch.integers("episode_index"), batch.integers("frame_index")
            known = (episode >= 0) & (episode < len(offset))
            target = np.where(known, offset[np.where(known, episode, 0)], -1)
            rows = np.flatnonzero(target >= 0)
            if not len(rows):
                continue
            frame, target = frame[rows], target[rows]
            if (frame < 0).any() or (frame >= length[episode[rows]]).any():
                raise DipoleError(f"{path}: 'frame_index' lies outside its episode, whose length is in meta/episodes")
            filled += len(rows)
            times[target + frame] = batch.timestamps()[rows]
            for key, feature in in_table.items():
                out[key][target + frame] = batch.values(key, feature, rows)
    _check_complete(entries, ends, times)
    _check_rate(entries, ends, times, layout)
    if filled != len(times):
        raise DipoleError(f"{layout.root}: the tables hold {filled - len(times)} frames twice: the dataset is damaged")


def _check_complete(entries: Sequence[Entry], ends: np.ndarray, times: np.ndarray) -> None:
    absent = np.isnan(times)
    if absent.any():
        number = int(np.searchsorted(ends, int(absent.argmax()), side="right"))
        entry = entries[number]
        raise DipoleError(
            f"{entry.data} lacks frames of episode {entry.index}, which should have {entry.length}: download it again"
        )


def _check_rate(entries: Sequence[Entry], ends: np.ndarray, times: np.ndarray, layout: Layout) -> None:
    """Refuse episodes that were recorded at another rate than the set's; jitter and a lost frame now and then pass."""
    lengths = np.array([entry.length for entry in entries])
    steps = (times[ends - 1] - times[ends - lengths]) / np.maximum(lengths - 1, 1)
    wrong = (lengths > 1) & (np.abs(steps * layout.fps - 1) > _RATE_TOLERANCE)
    if wrong.any():
        entry, step = entries[int(wrong.argmax())], float(steps[wrong][0])
        raise DipoleError(
            f"{entry.data}: the frames of episode {entry.index} are {step:.4f} s apart, but 'fps' in {layout.info} is "
            f"{layout.fps:g}: record or resample all episodes at one rate"
        )


def _read_videos(
    entries: Sequence[Entry],
    ends: np.ndarray,
    features: dict[str, Feature],
    columns: dict[str, np.ndarray],
    times: np.ndarray,
) -> None:
    from dipole.data.formats import video

    for key in (key for key, feature in features.items() if feature.dtype == "video"):
        for path, start, stop, shift in _stretches(entries, ends, key):
            wanted = times[start:stop] + np.repeat(*shift)
            video.read_frames(path, wanted, columns[key][start:stop])


def _stretches(
    entries: Sequence[Entry], ends: np.ndarray, key: str
) -> Iterator[tuple[Path, int, int, tuple[np.ndarray, np.ndarray]]]:
    """Yield (file, first frame, end, (start times, lengths)): episodes that follow each other in one file, as one."""
    first = 0
    while first < len(entries):
        last = first
        while last + 1 < len(entries) and _follows(entries[last], entries[last + 1], key):
            last += 1
        group = entries[first : last + 1]
        shift = np.array([entry.videos[key][1] for entry in group]), np.array([entry.length for entry in group])
        yield group[0].videos[key][0], int(ends[first] - group[0].length), int(ends[last]), shift
        first = last + 1


def _follows(entry: Entry, following: Entry, key: str) -> bool:
    (path, start), (next_path, next_start) = entry.videos[key], following.videos[key]
    return path == next_path and following.index == entry.index + 1 and next_start > start


def _renumber(column: np.ndarray, layout: Layout) -> np.ndarray:
    """Return task numbers 0.. in the order of `layout.tasks`, whose own numbers may have gaps."""
    found = np.unique(column)
    absent = [int(number) for number in found if int(number) not in layout.tasks]
    if absent:
        raise DipoleError(f"{layout.root}: task_index {absent[0]} is not in the table of tasks (meta/tasks)")
    order = {number: position for position, number in enumerate(layout.tasks)}
    new = np.array([order[int(number)] for number in found], dtype=np.int64)
    return new[np.searchsorted(found, column)]
