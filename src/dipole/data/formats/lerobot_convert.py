"""LeRobotDataset v3.0 <-> v2.1, file to file: rows, PNG bytes and video packets are copied, nothing is decoded.

The parts that both directions share; see `lerobot_v21_write` and `lerobot_v3_convert`. The versions differ in how many
episodes share a file, the names of files, and the form of the tables of episodes, tasks and statistics. Task numbers
and time stamps stay; episodes are numbered from 0 without gaps. Statistics that the source lacks (v2.0 has none per
episode) are computed; quantiles, which v2.1 does not have, are left out of it and not made up on the way back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dipole.data import statistics
from dipole.data.features import IMPLICIT, TASK_INDEX, Feature
from dipole.data.formats import lerobot, lerobot_layout
from dipole.data.formats.files import read_json, read_json_lines
from dipole.data.formats.lerobot_layout import Entry, Layout
from dipole.data.formats.lerobot_table import PARQUET_DAMAGE, open_parquet
from dipole.errors import DipoleError

STATISTICS = ("min", "max", "mean", "std", "count")
_SIDE_FOLDER = Path("meta") / "minari"

Stats = dict[str, dict[str, Any]]


@dataclass
class Report:
    """What a conversion did that the user should know.

    Attributes:
        episodes: Number of episodes.
        videos_copied: Videos (per episode and camera) whose packets were copied.
        videos_encoded: Videos that had to be encoded again, with a small loss.
        stats_computed: Whether statistics were missing, and computed.
    """

    episodes: int
    videos_copied: int = 0
    videos_encoded: list[str] = field(default_factory=list)
    stats_computed: bool = False


@dataclass(frozen=True)
class Source:
    """A dataset to convert: its description, and its `info.json` as it stands."""

    layout: Layout
    info: dict[str, Any]

    @property
    def video_keys(self) -> list[str]:
        """Names of the video features."""
        return [key for key, spec in self.info["features"].items() if spec.get("dtype") == "video"]

    @property
    def version(self) -> str:
        """`3.0`, `2.1` or `2.0`."""
        return str(self.info["codebase_version"]).removeprefix("v")


def open_source(path: Path) -> Source:
    """Read the description of a LeRobotDataset of any version."""
    layout = lerobot_layout.read(path)
    return Source(layout, read_json(layout.info))


def rows(source: Source) -> Iterator[tuple[int, Entry, pa.Table]]:
    """Yield (new number, entry, rows) of every episode; `episode_index` and `index` are those of the new set."""
    start = 0
    held: tuple[Path, pa.Table] | None = None
    for number, entry in enumerate(source.layout.entries):
        if held is None or held[0] != entry.data:
            held = entry.data, _read(entry.data)
        table = held[1].filter(pc.equal(held[1].column("episode_index"), entry.index))
        if table.num_rows != entry.length:
            raise DipoleError(
                f"{entry.data} has {table.num_rows} rows of episode {entry.index}, which should have {entry.length}: "
                "download it again"
            )
        numbers = {"episode_index": [number] * entry.length, "index": range(start, start + entry.length)}
        for name, values in numbers.items():
            place = table.schema.get_field_index(name)
            if place >= 0:
                column = pa.array(values, table.schema.field(place).type)
                table = table.set_column(place, table.schema.field(place), column)
        yield number, entry, table
        start += entry.length


def _read(path: Path) -> pa.Table:
    file = open_parquet(path)
    if "episode_index" not in file.schema_arrow.names:
        raise DipoleError(f"{path} has no column 'episode_index'")
    try:
        table = file.read()
        table.validate()
    except PARQUET_DAMAGE as error:
        raise DipoleError(f"{path} is damaged ({str(error).splitlines()[0][:120]}): download it again") from None
    return table


def with_list_type(table: pa.Table, name: str) -> pa.Table:
    """Return a table whose notes for the `datasets` package call lists `name`.

    `Sequence` is known to all its versions but was replaced by `List` in 4.0; LeRobot before 0.4 needs a version before
    that, which refuses a table with a `List`.
    """
    notes = dict(table.schema.metadata or {})
    try:
        value = json.loads(notes[b"huggingface"])
    except (KeyError, ValueError, RecursionError):
        return table
    notes[b"huggingface"] = json.dumps(_renamed(value, name)).encode()
    return table.replace_schema_metadata(notes)


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_renamed(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(item, name) for key, item in value.items()}
    return renamed | ({"_type": name} if value.get("_type") in ("List", "Sequence") else {})


def common_info(source: Source) -> dict[str, Any]:
    """Return the entries of `info.json` that all versions share, and those that none knows."""
    specific = {"total_videos", "total_chunks", "chunks_size", "data_files_size_in_mb", "video_files_size_in_mb"}
    info = {key: value for key, value in source.info.items() if key not in specific}
    entries = source.layout.entries
    return info | {
        "total_episodes": len(entries),
        "total_frames": sum(entry.length for entry in entries),
        "total_tasks": len(source.layout.tasks),
        "splits": {"train": f"0:{len(entries)}"} if _one_split(source) else source.info["splits"],
    }


def _one_split(source: Source) -> bool:
    splits = source.info.get("splits")
    return not isinstance(splits, dict) or splits.keys() <= {"train"}


def episode_tasks(source: Source, table: pa.Table) -> list[str]:
    """Return the sentences of an episode's rows."""
    if "task_index" not in table.column_names:
        return list(source.layout.tasks.values())
    found = pc.unique(table.column("task_index")).to_pylist()
    absent = [number for number in found if number not in source.layout.tasks]
    if absent:
        raise DipoleError(f"{source.layout.root}: task_index {absent[0]} is not in the table of tasks")
    return [source.layout.tasks[number] for number in sorted(found)]


def episode_stats(source: Source, report: Report) -> list[Stats]:
    """Return the statistics of every episode, as stored, or computed from the decoded frames."""
    found = _stored_stats_v3(source) if source.version.startswith("3") else _stored_stats_v21(source)
    wanted = [entry.index for entry in source.layout.entries]
    if all(index in found for index in wanted):
        return [found[index] for index in wanted]
    report.stats_computed = True
    return _computed_stats(source)


def _stored_stats_v3(source: Source) -> dict[int, Stats]:
    found: dict[int, Stats] = {}
    for path in sorted((source.layout.root / "meta" / "episodes").glob("*/*.parquet")):
        file = open_parquet(path)
        names = [name for name in file.schema_arrow.names if name.startswith("stats/")]
        if not names:
            continue
        try:
            listed = file.read(columns=["episode_index", *names]).to_pylist()
        except PARQUET_DAMAGE:
            raise DipoleError(f"{path} is damaged: download it again") from None
        for row in listed:
            stats: Stats = {}
            for name in names:
                key, _, statistic = name.removeprefix("stats/").rpartition("/")
                if row[name] is not None:
                    stats.setdefault(key, {})[statistic] = row[name]
            found[row["episode_index"]] = stats
    return found


def _stored_stats_v21(source: Source) -> dict[int, Stats]:
    path = source.layout.root / "meta" / "episodes_stats.jsonl"
    if not path.is_file():
        return {}
    listed = read_json_lines(path)
    if not all(isinstance(row.get("stats"), dict) and isinstance(row.get("episode_index"), int) for row in listed):
        raise DipoleError(f"{path} must hold 'episode_index' and 'stats' in every line: the file is damaged")
    return {row["episode_index"]: row["stats"] for row in listed}


def _computed_stats(source: Source) -> list[Stats]:
    """Return the statistics of every episode, one decoded at a time."""
    result = []
    for _, entry, table in rows(source):
        episode = lerobot.read(source.layout.root, episodes=[entry.index])
        stats = {
            key: statistics.column_stats(episode.columns[key], feature, key)
            for key, feature in episode.features.items()
            if not feature.is_string
        }
        # As they stand in the table: reading derives times anew, and renumbers tasks.
        for name in (name for name in (*IMPLICIT, TASK_INDEX) if name in table.column_names):
            values = table.column(name).to_numpy().astype(np.float64)[:, None]
            stats[name] = statistics.column_stats(values, Feature("float64", (1,)), name)
        result.append({key: {name: v.tolist() for name, v in row.items()} for key, row in stats.items()})
    return result


def total_stats(stats: list[Stats]) -> Stats:
    """Return the statistics over all episodes: means and variances pooled, quantiles averaged as LeRobot does.

    Raises:
        DipoleError: Those of the episodes do not fit together.
    """
    keys = [key for key in stats[0] if all(key in row for row in stats)]
    total: Stats = {}
    for key in keys:
        try:
            total[key] = _pooled([row[key] for row in stats])
        except (KeyError, ValueError, TypeError) as error:
            raise DipoleError(f"the statistics of '{key}' differ in form between episodes ({error})") from None
    return total


def _pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    arrays = {name: np.array([part[name] for part in parts]) for name in STATISTICS}
    count = arrays["count"].reshape(len(parts), *([1] * (arrays["mean"].ndim - 1))).astype(np.float64)
    mean = (count * arrays["mean"]).sum(0) / count.sum(0)
    variance = (count * (arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)).sum(0) / count.sum(0)
    pooled = {"min": arrays["min"].min(0), "max": arrays["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
    pooled["count"] = arrays["count"].sum(0)
    for name in (name for name in parts[0] if name[0] == "q" and all(name in part for part in parts)):
        pooled[name] = (count * np.array([part[name] for part in parts])).sum(0) / count.sum(0)
    return {name: value.tolist() for name, value in pooled.items()}


def copy_side_files(source: Source, root: Path) -> None:
    """Copy what dipole keeps beside a dataset that came from Minari."""
    if (source.layout.root / _SIDE_FOLDER).is_dir():
        shutil.copytree(source.layout.root / _SIDE_FOLDER, root / _SIDE_FOLDER)


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
