"""LeRobotDataset v2.1: writing, such that LeRobot 0.2 and 0.3 (and openpi, GR00T ...) open the result.

One parquet table and one video per episode. A v3.0 (or v2.0) set is converted file to file: see `lerobot_convert`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dipole.data.episodes import Episodes
from dipole.data.formats import lerobot_convert, lerobot_write, video_copy
from dipole.data.formats.files import atomic_folder
from dipole.data.formats.lerobot_arrow import create
from dipole.data.formats.lerobot_convert import STATISTICS, Report, Source, Stats
from dipole.data.formats.lerobot_write import Pictures
from dipole.errors import DipoleError

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
EPISODES_PER_CHUNK = 1000


def write(
    episodes: Episodes,
    path: str | Path,
    pictures: Pictures = "png",
    robot_type: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a LeRobotDataset v2.1; the arguments are those of `lerobot_write.write`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        lerobot_write.write(episodes, Path(folder) / "v3", pictures, robot_type)
        return from_v3(Path(folder) / "v3", path, overwrite)


def from_v3(source_path: str | Path, path: str | Path, overwrite: bool = False) -> Report:
    """Convert a LeRobotDataset v3.0 or v2.0 to v2.1.

    Args:
        source_path: Its folder.
        path: The folder to write; must not exist, or be empty.
        overwrite: Whether to replace what is at `path`.

    Raises:
        DipoleError: The source is damaged or of version 2.1 already, or `path` is taken.
    """
    source = lerobot_convert.open_source(Path(source_path))
    if source.version == "2.1":
        raise DipoleError(f"{source.layout.root} is of version 2.1 already")
    report = Report(len(source.layout.entries))
    with atomic_folder(Path(path), overwrite) as root:
        stats = lerobot_convert.episode_stats(source, report)
        listing = _write_episodes(source, root, report)
        meta = root / "meta"
        meta.mkdir()
        lines = [{"episode_index": i, "stats": _without_quantiles(row)} for i, row in enumerate(stats)]
        lerobot_convert.write_json_lines(meta / "episodes_stats.jsonl", lines)
        lerobot_convert.write_json_lines(meta / "episodes.jsonl", listing)
        tasks = [{"task_index": number, "task": text} for number, text in source.layout.tasks.items()]
        lerobot_convert.write_json_lines(meta / "tasks.jsonl", tasks)
        (meta / "info.json").write_text(json.dumps(_info(source), indent=4), encoding="utf-8")
        lerobot_convert.copy_side_files(source, root)
    return report


def _write_episodes(source: Source, root: Path, report: Report) -> list[dict[str, Any]]:
    """Write tables and videos; return the lines of `meta/episodes.jsonl`."""
    listing = []
    for number, entry, table in lerobot_convert.rows(source):
        with create(root / _place(DATA_PATH, number)) as sink:
            pq.write_table(lerobot_convert.with_list_type(table, "Sequence"), sink, compression="snappy")
        for key, (video, start) in entry.videos.items():
            target = root / _place(VIDEO_PATH, number, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            if video_copy.cut(video, start, entry.length, source.layout.fps, target):
                report.videos_copied += 1
            else:
                report.videos_encoded.append(f"{key}, episode {number}")
        tasks = lerobot_convert.episode_tasks(source, table)
        listing.append({"episode_index": number, "tasks": tasks, "length": entry.length})
    return listing


def _place(template: str, number: int, key: str = "") -> str:
    return template.format(episode_chunk=number // EPISODES_PER_CHUNK, episode_index=number, video_key=key)


def _without_quantiles(stats: Stats) -> Stats:
    return {key: {name: row[name] for name in STATISTICS if name in row} for key, row in stats.items()}


def _info(source: Source) -> dict[str, Any]:
    count = len(source.layout.entries)
    return lerobot_convert.common_info(source) | {
        "codebase_version": "v2.1",
        "total_videos": count * len(source.video_keys),
        "total_chunks": -(-count // EPISODES_PER_CHUNK),
        "chunks_size": EPISODES_PER_CHUNK,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if source.video_keys else None,
    }
