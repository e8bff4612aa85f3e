"""The run folder of a reproduction: finished parts are kept there, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dipole import __version__
from dipole.cores import usable_cores
from dipole.errors import MissingExtraError
from dipole.serialization import read_json, write_json
from dipole.systems.sources import digest

Progress = Callable[[str], None]
Job = tuple[str, dict[str, Any], Callable[[], Any]]


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
        saved_seconds: How long the parts found finished had taken; of parts that ran side by side, their share.
    """

    out: Path
    progress: Progress = silent
    fresh: bool = False
    plots: list[str] = field(default_factory=list)
    saved_seconds: float = 0.0

    def part(self, name: str, config: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the JSON-able result of `compute()`, from the run folder if it was finished there before.

        A finished part counts only if its configuration, the version of dipole, and the sources of the module that
        computes it and of all that this imports of dipole are the same (see `dipole.systems.sources`).

        Args:
            name: File name of the part, unique within the run.
            config: Everything the result depends on, JSON-able.
            compute: The work.
        """
        found, result = self._finished(name, config, compute)
        if found:
            return result
        self.progress(name)
        began = time.perf_counter()
        return self._keep(name, config, compute, compute(), time.perf_counter() - began)

    def parts(self, jobs: Sequence[Job], workers: int | None = None) -> list[Any]:
        """Return the results of several parts in their order; parts run at the same time, one process and thread each.

        Args:
            jobs: `(name, config, compute)` as for `part`; `compute` a module's function or a `partial` of one.
            workers: Processes; default one per core that this process may use. What runs in them does not depend on
                their number. With one, the parts are computed here, one after the other.
        """
        workers = workers or usable_cores()
        if workers == 1:
            return [self.part(*job) for job in jobs]
        results: dict[int, Any] = {}
        for index, job in enumerate(jobs):
            found, result = self._finished(*job)
            if found:
                results[index] = result
        missing = [index for index in range(len(jobs)) if index not in results]
        if not missing:
            return [results[index] for index in range(len(jobs))]
        count = min(len(missing), workers)
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
            futures = {pool.submit(_timed, jobs[index][2]): index for index in missing}
            self.progress(f"{len(missing)} of {len(jobs)} parts to compute, {count} at a time")
            for done, future in enumerate(as_completed(futures), 1):
                index = futures[future]
                try:
                    result, seconds = future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # what has not begun need not be waited for
                    raise
                results[index] = self._keep(*jobs[index], result, seconds / count)
                self.progress(f"{jobs[index][0]}: {seconds:.0f} s ({done} of {len(missing)})")
        return [results[index] for index in range(len(jobs))]

    def grid(
        self, names: Sequence[str], seeds: Sequence[int], settings: dict[str, Any], compute: Callable[[str, int], Any]
    ) -> dict[str, list[Any]]:
        """Return, for each name, the results of `compute(name, seed)` over the seeds; see `parts`.

        Args:
            names: What is compared.
            seeds: Training seeds.
            settings: Everything else the results depend on, JSON-able.
            compute: A function of a module.
        """
        jobs: list[Job] = [
            (_slug(f"{name}-{seed}"), {"name": name, "seed": seed, **settings}, partial(compute, name, seed))
            for seed in seeds
            for name in names
        ]
        results = self.parts(jobs)
        return {name: results[index :: len(names)] for index, name in enumerate(names)}

    def _path(self, name: str) -> Path:
        return self.out / "parts" / f"{name}.json"

    def _finished(self, name: str, config: dict[str, Any], compute: Callable[[], Any]) -> tuple[bool, Any]:
        path = self._path(name)
        if self.fresh or not path.is_file():
            return False, None
        saved = read_json(path)
        if saved.get("key") != _key(name, config, compute):
            return False, None
        self.progress(f"{name}: finished earlier")
        self.saved_seconds += float(saved.get("seconds", 0.0))
        return True, saved["result"]

    def _keep(self, name: str, config: dict[str, Any], compute: Any, result: Any, seconds: float) -> Any:
        result = json.loads(json.dumps(result))
        key = _key(name, config, compute)
        write_json(self._path(name), {"key": key, "config": config, "seconds": seconds, "result": result})
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


def _slug(text: str) -> str:
    return text.replace(", ", "-").replace(" ", "-")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return compute(), time.perf_counter() - began


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
    module = getattr(getattr(compute, "func", compute), "__module__", "") or ""
    text = json.dumps([name, config, digest(module), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
