"""LeRobotDataset v2.1 and v2.0 to v3.0, file to file (see `lerobot_convert`): episodes are put into larger files."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dipole.data.formats import lerobot_convert
from dipole.data.formats.files import atomic_folder
from dipole.data.formats.lerobot_arrow import (
    DATA_FILE_MB,
    DATA_PATH,
    FILES_PER_CHUNK,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    Tables,
    create,
    place,
)
from dipole.data.formats.lerobot_convert import Report, Source, Stats
from dipole.data.formats.lerobot_write import tasks_table
from dipole.data.formats.video_copy import Joiner
from dipole.errors import DipoleError

Columns = dict[str, list[Any]]


def to_v3(source_path: str | Path, path: str | Path, overwrite: bool = False) -> Report:
    """Convert a LeRobotDataset v2.1 or v2.0 to v3.0.

    Args:
        source_path: Its folder.
        path: The folder to write; must not exist, or be empty.
        overwrite: Whether to replace what is at `path`.

    Raises:
        DipoleError: The source is damaged or of version 3.0 already, or `path` is taken.
    """
    source = lerobot_convert.open_source(Path(source_path))
    if source.version.startswith("3"):
        raise DipoleError(f"{source.layout.root} is of version {source.version} already")
    report = Report(len(source.layout.entries))
    with atomic_folder(Path(path), overwrite) as root:
        stats = lerobot_convert.episode_stats(source, report)
        columns = _write_tables(source, root)
        for key in source.video_keys:
            columns |= _write_videos(source, key, root, report)
        _write_meta(source, root, columns | _stats_columns(stats), stats)
        lerobot_convert.copy_side_files(source, root)
    return report


def _write_tables(source: Source, root: Path) -> Columns:
    lengths = [entry.length for entry in source.layout.entries]
    columns: Columns = {"episode_index": list(range(len(lengths))), "tasks": [], "length": lengths}
    files: list[int] = []
    _, _, first = next(lerobot_convert.rows(source))
    schema = lerobot_convert.with_list_type(first, "List").schema
    with Tables(root, schema) as tables:
        for _, entry, table in lerobot_convert.rows(source):
            columns["tasks"].append(lerobot_convert.episode_tasks(source, table))
            files.append(tables.write(_cast(table, schema, entry.data)))
    ends = list(accumulate(lengths))
    return columns | {
        "data/chunk_index": [file // FILES_PER_CHUNK for file in files],
        "data/file_index": [file % FILES_PER_CHUNK for file in files],
        "dataset_from_index": [end - length for end, length in zip(ends, lengths, strict=True)],
        "dataset_to_index": ends,
    }


def _cast(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """Return a table in the form of the first one: writers of different age differ in it."""
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError) as error:
        raise DipoleError(f"{path} differs from the other tables ({str(error).splitlines()[0][:120]})") from None


def _write_videos(source: Source, key: str, root: Path, report: Report) -> Columns:
    """Join one feature's videos into files of at most 200 MB; return its columns of the table of episodes."""
    names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns: Columns = {f"videos/{key}/{name}": [] for name in names}
    entries = source.layout.entries
    number = done = 0
    while done < len(entries):
        path = root / place(VIDEO_PATH, number, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with Joiner(path, source.layout.fps) as joiner:
            while done < len(entries) and joiner.nbytes < VIDEO_FILE_MB * 2**20:
                entry = entries[done]
                begin = joiner.frames
                if not joiner.append(entry.videos[key][0], entry.length):
                    break
                times = begin / source.layout.fps, joiner.frames / source.layout.fps
                row = (number // FILES_PER_CHUNK, number % FILES_PER_CHUNK, *times)
                for name, value in zip(names, row, strict=True):
                    columns[f"videos/{key}/{name}"].append(value)
                report.videos_copied += 1
                done += 1
        number += 1
    return columns


def _stats_columns(stats: list[Stats]) -> Columns:
    names = {(key, name): None for row in stats for key, values in row.items() for name in values}
    return {f"stats/{key}/{name}": [row.get(key, {}).get(name) for row in stats] for key, name in names}


def _write_meta(source: Source, root: Path, columns: Columns, stats: list[Stats]) -> None:
    count = len(source.layout.entries)
    columns |= {"meta/episodes/chunk_index": [0] * count, "meta/episodes/file_index": [0] * count}
    try:
        table = pa.table(columns)
    except (pa.ArrowException, TypeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DipoleError(f"{source.layout.root}: the statistics differ in form between episodes ({reason})") from None
    with create(root / "meta/episodes/chunk-000/file-000.parquet") as sink:
        pq.write_table(table, sink, compression="snappy")
    tasks = tasks_table(tuple(source.layout.tasks.values()))
    numbers = pa.array(list(source.layout.tasks), pa.int64())
    with create(root / "meta/tasks.parquet") as sink:
        pq.write_table(tasks.set_column(tasks.schema.get_field_index("task_index"), "task_index", numbers), sink)
    total = lerobot_convert.total_stats(stats)
    (root / "meta/stats.json").write_text(json.dumps(total, indent=4), encoding="utf-8")
    info = lerobot_convert.common_info(source) | {
        "codebase_version": "v3.0",
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if source.video_keys else None,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
