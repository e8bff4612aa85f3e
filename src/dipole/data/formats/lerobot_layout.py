"""What the description of a LeRobotDataset says: features, tasks, and where each episode lies (v3.0, v2.1, v2.0)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dipole.data.features import IMPLICIT, Feature
from dipole.data.formats.files import entry as get
from dipole.data.formats.files import fill, inside, read_json, read_json_lines
from dipole.data.formats.lerobot_table import PARQUET_DAMAGE, open_parquet
from dipole.errors import DipoleError

_LEFT_OUT = ("language",)
_CHANNEL_NAMES = ("channel", "channels", "c")


@dataclass(frozen=True)
class Entry:
    """Where one episode lies.

    Attributes:
        index: Its number.
        length: Its frames.
        data: The parquet file with its rows.
        videos: Per video feature, the file and the time of its first frame in it.
        depth: Video features that hold depth.
    """

    index: int
    length: int
    data: Path
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)
    depth: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layout:
    """A dataset's description.

    Attributes:
        root: Its folder.
        info: Its `meta/info.json`.
        fps: Frames per second.
        features: What the user sees: without the implicit columns, pictures as (H, W, C).
        tasks: Sentence per task number, rising.
        entries: Its episodes, rising.
    """

    root: Path
    info: Path
    fps: float
    features: dict[str, Feature]
    tasks: dict[int, str]
    entries: list[Entry]


def read(root: Path) -> Layout:
    """Read the description of the dataset in `root`.

    Raises:
        DipoleError: It is missing, damaged, inconsistent, or of an unknown version.
    """
    path = inside(root, "meta/info.json")
    info = read_json(path)
    version = get(info, "codebase_version", str, path)
    described = get(info, "features", dict, path)
    features = {key: _feature(key, spec, path) for key, spec in described.items() if _wanted(key, spec)}
    fps = float(get(info, "fps", float, path))
    if not (math.isfinite(fps) and fps > 0):
        raise DipoleError(f"{path}: 'fps' is {fps}: it must be positive")
    video = [key for key, feature in features.items() if feature.dtype == "video"]
    if re.fullmatch(r"v?3\.\d+", version):
        tasks, entries = _tasks_v3(root), _entries_v3(root, info, path, video)
    elif re.fullmatch(r"v?2\.[01]", version):
        tasks, entries = _tasks_v2(root), _entries_v2(root, info, path, video)
    else:
        raise DipoleError(f"{path} is of version {version}: v3.0, v2.1 and v2.0 can be read; convert it with LeRobot")
    depth = frozenset(key for key in video if _is_depth(described[key]))
    entries = [Entry(e.index, e.length, e.data, e.videos, depth) for e in sorted(entries, key=lambda e: e.index)]
    _check_totals(info, path, entries)
    return Layout(root, path, fps, features, dict(sorted(tasks.items())), entries)


def _wanted(key: str, spec: Any) -> bool:
    """Leave out the implicit columns and annotations in the newest sets that are no frames of numbers."""
    return key not in IMPLICIT and not (isinstance(spec, dict) and spec.get("dtype") in _LEFT_OUT)


def _feature(key: str, spec: Any, path: Path) -> Feature:
    if not isinstance(spec, dict):
        raise DipoleError(f"{path}: feature '{key}' is not described by an object")
    dtype = get(spec, "dtype", str, path)
    shape = get(spec, "shape", list, path)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise DipoleError(f"{path}: feature '{key}' has shape {shape}: sizes must be whole numbers")
    names = _names(spec.get("names"))
    shape = shape or [1]
    try:
        if dtype in ("image", "video"):
            if names and names[0].lower() in _CHANNEL_NAMES and len(shape) == 3:
                shape = [shape[1], shape[2], shape[0]]
            return Feature(dtype, tuple(shape))
        return Feature(dtype, tuple(shape), names if names and len(names) == math.prod(shape) else None)
    except DipoleError as error:
        raise DipoleError(f"{path}: '{key}': {error}") from None


def _names(names: Any) -> tuple[str, ...] | None:
    """Return the names as a flat tuple: they come as a list, a list in a list, or an object of lists."""
    if isinstance(names, dict):
        names = list(names.values())
    if not isinstance(names, list) or not names:
        return None
    if all(isinstance(name, list) for name in names):
        names = [inner for name in names for inner in name]
    return tuple(str(name) for name in names)


def _is_depth(spec: Mapping[str, Any]) -> bool:
    notes = spec.get("info") or spec.get("video_info") or {}
    return isinstance(notes, dict) and bool(notes.get("video.is_depth_map") or notes.get("is_depth_map"))


def _check_totals(info: Mapping[str, Any], path: Path, entries: list[Entry]) -> None:
    if not entries:
        raise DipoleError(f"{path}: the dataset has no episodes")
    for entry in entries:
        if not (1 <= entry.length < 2**40 and 0 <= entry.index < 2**40):
            raise DipoleError(f"{path}: episode {entry.index} has length {entry.length}: the description is damaged")
    if len({entry.index for entry in entries}) != len(entries) or entries[-1].index >= 100 * len(entries) + 1000:
        raise DipoleError(f"{path}: the numbers of the episodes repeat or are absurd: the description is damaged")
    totals = {"total_episodes": len(entries), "total_frames": sum(entry.length for entry in entries)}
    for key, found in totals.items():
        if key in info and info[key] != found:
            raise DipoleError(
                f"{path}: '{key}' is {info[key]}, but the table of episodes has {found}: files of the dataset are "
                "missing, download it again"
            )


def _entries_v3(root: Path, info: Mapping[str, Any], path: Path, video: list[str]) -> list[Entry]:
    """Read `meta/episodes/**.parquet`, leaving out the columns of statistics, which are large."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DipoleError(f"{root / 'meta' / 'episodes'} holds no parquet file: the dataset is incomplete")
    data_path = get(info, "data_path", str, path)
    video_path = get(info, "video_path", str, path) if video else ""
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{name}" for key in video for name in ("chunk_index", "file_index", "from_timestamp")]
    entries = []
    for file in files:
        inside(root, str(file.relative_to(root)))
        for row in _rows(file, columns):
            data = fill(data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            videos = {}
            for key in video:
                name = f"videos/{key}"
                chunk, number = row[f"{name}/chunk_index"], row[f"{name}/file_index"]
                target = fill(video_path, video_key=key, chunk_index=chunk, file_index=number)
                videos[key] = inside(root, target), float(row[f"{name}/from_timestamp"])
            entries.append(Entry(row["episode_index"], row["length"], inside(root, data), videos))
    return entries


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    file = open_parquet(path)
    for name in columns:
        if name not in file.schema_arrow.names:
            raise DipoleError(f"{path} has no column '{name}'")
        kind = file.schema_arrow.field(name).type
        if not (pa.types.is_integer(kind) or (name.endswith("timestamp") and pa.types.is_floating(kind))):
            raise DipoleError(f"{path}: '{name}' is {kind}, it must be a number")
    try:
        rows: list[dict[str, Any]] = file.read(columns=columns).to_pylist()
    except PARQUET_DAMAGE as error:
        raise DipoleError(f"{path} is damaged ({error}): download it again") from None
    for row in rows:
        empty = [name for name in columns if row[name] is None]
        if empty:
            raise DipoleError(f"{path}: '{empty[0]}' has an empty cell: the file is damaged")
    return rows


def _tasks_v3(root: Path) -> dict[int, str]:
    """Read `meta/tasks.parquet`: the sentence is an unnamed pandas index, an index named `task`, or a column."""
    path = inside(root, "meta/tasks.parquet")
    file = open_parquet(path)
    names = file.schema_arrow.names
    text = [name for name in ("task", "__index_level_0__") if name in names]
    if "task_index" not in names or not text:
        raise DipoleError(f"{path} must have 'task_index' and the sentences as index or column 'task': {names}")
    try:
        table = file.read(columns=["task_index", text[0]])
    except PARQUET_DAMAGE as error:
        raise DipoleError(f"{path} is damaged ({error}): download it again") from None
    pairs = zip(table.column("task_index").to_pylist(), table.column(text[0]).to_pylist(), strict=True)
    return _tasks(list(pairs), path)


def _tasks_v2(root: Path) -> dict[int, str]:
    path = inside(root, "meta/tasks.jsonl")
    return _tasks([(get(r, "task_index", int, path), get(r, "task", str, path)) for r in read_json_lines(path)], path)


def _tasks(pairs: list[tuple[Any, Any]], path: Path) -> dict[int, str]:
    if not all(isinstance(number, int) and isinstance(text, str) for number, text in pairs):
        raise DipoleError(f"{path}: a task must be a number and a sentence: the file is damaged")
    tasks = dict(pairs)
    if len(tasks) != len(pairs):
        raise DipoleError(f"{path}: a task_index occurs twice: the file is damaged")
    return tasks


def _entries_v2(root: Path, info: Mapping[str, Any], path: Path, video: list[str]) -> list[Entry]:
    """Read `meta/episodes.jsonl`; every episode has its own files."""
    listing = inside(root, "meta/episodes.jsonl")
    data_path = get(info, "data_path", str, path)
    video_path = get(info, "video_path", str, path) if video else ""
    chunk_size = get(info, "chunks_size", int, path)
    if chunk_size < 1:
        raise DipoleError(f"{path}: 'chunks_size' is {chunk_size}: it must be positive")
    entries = []
    for row in read_json_lines(listing):
        index, length = get(row, "episode_index", int, listing), get(row, "length", int, listing)
        place = {"episode_chunk": index // chunk_size, "episode_index": index}
        videos = {key: (inside(root, fill(video_path, video_key=key, **place)), 0.0) for key in video}
        entries.append(Entry(index, length, inside(root, fill(data_path, **place)), videos))
    return entries
