"""What a run was started with: `RUN/train.json`, compared on resumption."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.episodes import Episodes
from dipole.errors import DipoleError
from dipole.serialization import read_json, to_dict, write_json
from dipole.training.config import FREE, TrainConfig
from dipole.training.plan import Plan

FORMAT = 1
RECORD = "train.json"


def fingerprint(episodes: Episodes, keys: Iterable[str]) -> dict[str, Any]:
    """Return what tells one dataset from another: its size, and a checksum of each column (images: of some frames)."""
    checksums = {}
    for key in keys:
        column = episodes.columns[key]
        rows = column[:: max(1, len(column) // 64)] if column[:1].nbytes > 4096 else column
        checksums[key] = zlib.crc32(np.ascontiguousarray(rows).data)
    return {"episodes": episodes.num_episodes, "frames": episodes.num_frames, "checksums": checksums}


def describe(config: TrainConfig, policy: Any, data: Mapping[str, Any], command: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that must be the same when a run is resumed, what may differ (`free`), and `command`."""
    values = to_dict(config)
    return {
        "train": {key: value for key, value in values.items() if key not in FREE},
        "policy": to_dict(policy.config),
        "data": to_dict(data),
        "free": {key: values[key] for key in FREE},
        "command": dict(command),
    }


def check_same(stored: Mapping[str, Any], present: Mapping[str, Any], out: Path) -> None:
    """Raise DipoleError naming the keys in which a run and its resumption differ."""
    differing = []
    for part in ("train", "policy", "data"):
        old, new = _flat(stored.get(part, {}), part), _flat(present[part], part)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                differing.append(f"{key} was {old.get(key)!r}, now {new.get(key)!r}")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise DipoleError(
            f"{out}: cannot be resumed with other settings: {'; '.join(differing[:3])}{more}: "
            "use the same ones, or another --out"
        )


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {key: item for name, inner in value.items() for key, item in _flat(inner, f"{path}.{name}").items()}
    return {path: value}


def check_out(out: Path, resume: bool) -> None:
    """Raise DipoleError when the output folder does not suit: in use without `resume`, or nothing to resume."""
    if out.exists() and not out.is_dir():
        raise DipoleError(f"{out}: is a file: choose another output folder")
    if resume:
        if not (out / RECORD).is_file():
            raise DipoleError(f"{out}: nothing to resume ('{RECORD}' is missing): start the run without --resume")
    elif out.is_dir() and any(out.iterdir()):
        hint = "go on with --resume, or choose another --out" if (out / RECORD).is_file() else "choose another --out"
        raise DipoleError(f"{out}: the output folder is not empty: {hint}")


def write_record(out: Path, described: Mapping[str, Any], plan: Plan) -> None:
    """Write `train.json`."""
    write_json(out / RECORD, {"format": FORMAT, "plan": to_dict(plan), **described})


def read_record(out: Path) -> tuple[dict[str, Any], Plan]:
    """Return the description and the plan of a run.

    Raises:
        DipoleError: The file is missing or damaged.
    """
    record = read_json(out / RECORD)
    try:
        plan = record["plan"]
        return record, Plan(int(plan["steps"]), plan["precision"], dict(plan["seconds_per_update"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DipoleError(f"{out / RECORD}: not the record of a run ({error}): restore it from a copy") from None
