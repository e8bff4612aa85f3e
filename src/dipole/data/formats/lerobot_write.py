"""LeRobotDataset v3.0: writing, such that LeRobot 0.4 opens the result.

Frames go to parquet tables (one row group per episode, files of about 100 MB), pictures into the tables as PNG or into
shared mp4 files, statistics into `meta/stats.json` and the table of episodes. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dipole.data import statistics
from dipole.data.episodes import Episodes
from dipole.data.features import IMPLICIT, TASK_INDEX, Feature
from dipole.data.formats.files import atomic_folder
from dipole.data.formats.lerobot_arrow import (
    DATA_FILE_MB,
    DATA_PATH,
    FILES_PER_CHUNK,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    Tables,
    arrow_type,
    create,
    hub_feature,
    place,
    to_arrow,
)
from dipole.errors import DipoleError, unknown

Pictures = Literal["png", "h264", "av1"]

DEFAULT_TASK = "no task was named"

_IMPLICIT_FEATURES = {"timestamp": Feature("float32", (1,))} | {
    key: Feature("int64", (1,)) for key in (*IMPLICIT[1:], TASK_INDEX)
}


def write(
    episodes: Episodes,
    path: str | Path,
    pictures: Pictures = "png",
    robot_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a LeRobotDataset v3.0.

    Args:
        episodes: What to write. Without `task_index`, all frames get one placeholder task.
        path: The folder; must not exist, or be empty.
        pictures: `png`: lossless, inside the tables; `h264` or `av1`: video files (lossy, small; extra `data`).
        robot_type: Name of the robot, for `info.json`.
        overwrite: Whether to replace what is at `path`.

    Raises:
        DipoleError: `path` is taken, or a feature cannot be stored.
    """
    if pictures not in ("png", "h264", "av1"):
        raise unknown("way to store pictures", pictures, ("png", "h264", "av1"))
    features = {key: _stored(key, feature, pictures) for key, feature in episodes.features.items()}
    features |= {key: f for key, f in _IMPLICIT_FEATURES.items() if key not in features}
    with atomic_folder(Path(path), overwrite) as root:
        table: dict[str, list[Any]] = {"episode_index": list(range(episodes.num_episodes))}
        table |= _write_frames(episodes, features, root)
        for key in (key for key, feature in features.items() if feature.dtype == "video"):
            table |= _write_videos(episodes, key, root, pictures)
        table |= _episode_stats(episodes, features)
        _write_meta(episodes, features, root, table, robot_type)


def _stored(key: str, feature: Feature, pictures: Pictures) -> Feature:
    if len(feature.shape) > 5:
        raise DipoleError(f"'{key}' has {len(feature.shape)} axes: LeRobot's format holds up to 5")
    if "/" in key or key.startswith("."):
        raise DipoleError(f"'{key}' is no feature name: it may not hold '/' or start with a dot")
    if not feature.is_image:
        return feature
    as_video = pictures != "png" and feature.shape[2] == 3
    return Feature("video" if as_video else "image", feature.shape)


def _frames(episodes: Episodes, index: int) -> dict[str, np.ndarray]:
    """Return all columns of an episode, the implicit ones included."""
    columns = episodes.episode(index)
    length = int(episodes.lengths[index])
    start = int(episodes.starts[index])
    frame = np.arange(length)
    implicit: dict[str, np.ndarray] = {
        "timestamp": (frame / episodes.fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(length, index),
        "index": start + frame,
        TASK_INDEX: np.zeros(length, dtype=np.int64),
    }
    return {key: values[:, None] for key, values in implicit.items()} | columns


def _write_frames(episodes: Episodes, features: dict[str, Feature], root: Path) -> dict[str, list[Any]]:
    """Write the tables; return the columns of the table of episodes that say where each one lies."""
    in_table = {key: feature for key, feature in features.items() if feature.dtype != "video"}
    schema = pa.schema([(key, arrow_type(feature)) for key, feature in in_table.items()])
    notes: dict[str, Any] = {"info": {"features": {key: hub_feature(feature) for key, feature in in_table.items()}}}
    schema = schema.with_metadata({"huggingface": json.dumps(notes)})
    files = []
    with Tables(root, schema) as tables:
        for index in range(episodes.num_episodes):
            columns = _frames(episodes, index)
            arrays = [to_arrow(columns[key], feature) for key, feature in in_table.items()]
            files.append(tables.write(pa.Table.from_arrays(arrays, schema=schema)))
    return {
        "tasks": [_tasks_of(episodes, index) for index in range(episodes.num_episodes)],
        "length": episodes.lengths.tolist(),
        "data/chunk_index": [file // FILES_PER_CHUNK for file in files],
        "data/file_index": [file % FILES_PER_CHUNK for file in files],
        "dataset_from_index": episodes.starts.tolist(),
        "dataset_to_index": episodes.ends.tolist(),
    }


def _tasks(episodes: Episodes) -> tuple[str, ...]:
    """Return the sentences; numbers without one (or a set without tasks) get a placeholder, as the format needs one."""
    if TASK_INDEX not in episodes.columns:
        return (DEFAULT_TASK,)
    if episodes.tasks:
        return episodes.tasks
    return tuple(f"task {number}" for number in range(int(episodes.columns[TASK_INDEX].max()) + 1))


def _tasks_of(episodes: Episodes, index: int) -> list[str]:
    tasks = _tasks(episodes)
    if TASK_INDEX not in episodes.columns:
        return list(tasks)
    return [tasks[int(number)] for number in np.unique(episodes.episode(index)[TASK_INDEX])]


def _write_videos(episodes: Episodes, key: str, root: Path, codec: str) -> dict[str, list[Any]]:
    """Write one feature's videos, several episodes to a file; return its columns of the table of episodes."""
    from dipole.data.formats import video

    names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    table: dict[str, list[Any]] = {f"videos/{key}/{name}": [] for name in names}
    for number, group in enumerate(_video_groups(episodes, key)):
        path = root / place(VIDEO_PATH, number, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        first, last = int(episodes.starts[group[0]]), int(episodes.ends[group[-1]])
        pictures = iter(episodes.columns[key][first:last])
        starts = {int(episodes.starts[index]) - first for index in group}
        video.write_frames(path, pictures, episodes.fps, codec, starts)
        for index in group:
            row = (
                number // FILES_PER_CHUNK,
                number % FILES_PER_CHUNK,
                float((episodes.starts[index] - first) / episodes.fps),
                float((episodes.ends[index] - first) / episodes.fps),
            )
            for name, value in zip(names, row, strict=True):
                table[f"videos/{key}/{name}"].append(value)
    return table


def _video_groups(episodes: Episodes, key: str) -> Iterator[list[int]]:
    """Yield runs of episodes that share a file: at most 200 MB when a frame shrinks to a tenth (it shrinks to less)."""
    frame_bytes = episodes.features[key].size / 10
    group: list[int] = []
    frames = 0
    for index, length in enumerate(episodes.lengths):
        if group and (frames + length) * frame_bytes > VIDEO_FILE_MB * 2**20:
            yield group
            group, frames = [], 0
        group.append(index)
        frames += length
    yield group


def _episode_stats(episodes: Episodes, features: dict[str, Feature]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {}
    for index in range(episodes.num_episodes):
        columns = _frames(episodes, index)
        for key, feature in features.items():
            if feature.is_string:
                continue
            for name, value in statistics.column_stats(columns[key], feature, key).items():
                table.setdefault(f"stats/{key}/{name}", []).append(value.tolist())
    return table


def _write_meta(
    episodes: Episodes, features: dict[str, Feature], root: Path, table: dict[str, list[Any]], robot_type: str | None
) -> None:
    count = episodes.num_episodes
    table |= {"meta/episodes/chunk_index": [0] * count, "meta/episodes/file_index": [0] * count}
    with create(root / "meta/episodes/chunk-000/file-000.parquet") as sink:
        pq.write_table(pa.table(table), sink, compression="snappy")
    tasks = _tasks(episodes)
    with create(root / "meta/tasks.parquet") as sink:
        pq.write_table(tasks_table(tasks), sink)
    _write_json(root / "meta/stats.json", _total_stats(episodes, features))
    video = [key for key, feature in features.items() if feature.dtype == "video"]
    whole = float(episodes.fps).is_integer()
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": count,
        "total_frames": episodes.num_frames,
        "total_tasks": len(tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": int(episodes.fps) if whole else float(episodes.fps),
        "splits": {"train": f"0:{count}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None,
        "features": {key: _described(feature) for key, feature in features.items()},
    }
    _write_json(root / "meta/info.json", info)


def tasks_table(tasks: tuple[str, ...]) -> pa.Table:
    """Return the table of tasks with the sentence as the unnamed pandas index, the form LeRobot 0.4 writes."""
    index = "__index_level_0__"
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    column = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    notes = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [number | {"metadata": None}, column],
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(notes)})


def _total_stats(episodes: Episodes, features: dict[str, Feature]) -> dict[str, Any]:
    implicit = {
        "timestamp": episodes.timestamp,
        "frame_index": episodes.frame_index,
        "episode_index": episodes.episode_index,
        "index": np.arange(episodes.num_frames),
        TASK_INDEX: np.zeros(episodes.num_frames, dtype=np.int64),
    }
    stats = {
        key: statistics.column_stats(values[:, None], features[key], key)
        for key, values in implicit.items()
        if key not in episodes.columns
    }
    stats |= episodes.stats()
    return {key: {name: value.tolist() for name, value in row.items()} for key, row in stats.items()}


def _described(feature: Feature) -> dict[str, Any]:
    names = list(feature.names) if feature.names else None
    if feature.is_image:
        names = ["height", "width", "channels"]
    return {"dtype": feature.dtype, "shape": list(feature.shape), "names": names}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
