"""The run folder of a reproduction: finished parts are kept there, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dipole import __version__
from dipole.errors import MissingExtraError
from dipole.serialization import read_json, write_json

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Report no progress."""


@dataclass
class Run:
    """Where a reproduction puts its files and reads what an earlier, interrupted run finished.

    Attributes:
        out: The run folder.
        progress: Called with one line whenever a part starts or is found finished.
        fresh: Compute everything again.
        plots: Names of the plots written so far.
    """

    out: Path
    progress: Progress = silent
    fresh: bool = False
    plots: list[str] = field(default_factory=list)

    def part(self, name: str, config: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the JSON-able result of `compute()`, from the run folder if it was finished there before.

        A finished part counts only if its configuration, the source of the module that computes it and the version
        of dipole are the same.

        Args:
            name: File name of the part, unique within the run.
            config: Everything the result depends on, JSON-able.
            compute: The work.
        """
        path = self.out / "parts" / f"{name}.json"
        key = _key(name, config, compute)
        if not self.fresh and path.is_file():
            saved = read_json(path)
            if saved.get("key") == key:
                self.progress(f"{name}: finished earlier")
                return saved["result"]
        self.progress(name)
        result = json.loads(json.dumps(compute()))
        write_json(path, {"key": key, "config": config, "result": result})
        return result

    @contextmanager
    def plot(self, name: str, width: float = 6.0, height: float = 4.0) -> Iterator[Any]:
        """Give the axes of a new figure, saved as `<name>.png` afterwards; without matplotlib, axes that do nothing."""
        try:
            figure, axes = _figure(width, height)
        except MissingExtraError as error:
            self.progress(f"no plot '{name}': {error}")
            yield _NoAxes()
            return
        yield axes
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.out / f".{name}.tmp.png"
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
        temporary.replace(self.out / f"{name}.png")
        self.plots.append(f"{name}.png")


class _NoAxes:
    """Stands in for matplotlib's axes where matplotlib is missing: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _key(name: str, config: dict[str, Any], compute: Callable[[], Any]) -> str:
    function = getattr(compute, "func", compute)
    module = sys.modules.get(getattr(function, "__module__", ""))
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        source = ""
    text = json.dumps([name, config, source, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
