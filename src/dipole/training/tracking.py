"""Where figures go: always `metrics.jsonl`, and TensorBoard or Weights & Biases when asked for."""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dipole.errors import DipoleError, MissingExtraError, unknown
from dipole.serialization import write_text

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Receives figures."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures of a step."""

    def close(self) -> None:
        """Write out what is pending."""


class JsonLines:
    """One JSON object a line. After a resumption, lines of steps that are run again are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        if self.path.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        # Unbuffered: what could not be written must not be tried again when the file is closed.
        self._file = self.path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DipoleError(
                f"{self.path}: cannot be written ({error.strerror}): free some space and go on with --resume"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files in `RUN/tensorboard`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the folder; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve().name
        self._run: Any = wandb.init(
            project="dipole", name=name, id=name, dir=str(folder), config=dict(config), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures in each."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close each."""
        for tracker in self.trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise DipoleError when a tracker is unknown or its package is not installed."""
    packages = {"tensorboard": "tensorboard", "wandb": "wandb"}
    for name in names:
        if name not in packages:
            raise unknown("tracker", name, packages)
        try:
            importlib.import_module(packages[name])
        except ImportError:
            raise MissingExtraError(packages[name], "track") from None


def open_trackers(names: Sequence[str], folder: Path, step: int, config: Mapping[str, Any]) -> Trackers:
    """Return `metrics.jsonl` and the named trackers, to go on after `step`."""
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder, step),
        "wandb": lambda: WeightsAndBiases(folder, step, config),
    }
    return Trackers([JsonLines(folder, step), *(makers[name]() for name in names)])


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` of a run; a last line torn by a kill is left out."""
    path = Path(folder) / METRICS
    if not path.exists():
        raise DipoleError(f"{path}: no such file: give the folder of a training run")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
