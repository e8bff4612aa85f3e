"""The committed results of all systems, `results.json`: written by `dipole reproduce --record` only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dipole.errors import DipoleError
from dipole.serialization import read_json, write_json
from dipole.systems.card import Report

RESULTS = Path(__file__).with_name("results.json")


def load(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return recorded reports as `{system: {tier: report}}`; empty where nothing was recorded.

    Args:
        path: The results file (default: the one inside the package).

    Raises:
        DipoleError: The file is not JSON.
    """
    path = RESULTS if path is None else path
    if not path.is_file():
        return {}
    results: dict[str, dict[str, Any]] = read_json(path)
    return results


def record(report: Report, path: Path | None = None) -> None:
    """Put a report into the results file in place of the earlier one of that system and tier.

    Raises:
        DipoleError: The file cannot be written.
    """
    path = RESULTS if path is None else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            results = load(path)
            results.setdefault(report.system, {})[report.tier] = report.as_dict()
            write_json(path, results)
    except OSError as error:
        raise DipoleError(f"cannot record the result in {path}: {error.strerror or error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two reproductions that end together both keep their results."""
    try:
        import fcntl
    except ImportError:  # not on this operating system: the rename alone must do
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
