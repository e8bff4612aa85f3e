"""Look at a dataset: counts, ranges, and defects such as NaN, constant dimensions or repeated frames.

Reads LeRobotDataset v3.0, v2.1 and v2.0, Minari, zarr replay buffers, npz archives and robomimic files, from a path or
by name from the Hugging Face Hub.

Examples:
  dipole inspect runs/demos
  dipole inspect lerobot/pusht --no-images --json
  dipole inspect demos.npz --plot runs/demos-plots
  dipole inspect runs/demos --fix runs/demos-mended
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dipole.errors import DipoleError

if TYPE_CHECKING:
    from rich.console import Console

_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
_DIMENSIONS_SHOWN = 8


@dataclass
class Args:
    """Options of `dipole inspect`."""

    path: tyro.conf.Positional[str]
    """A file or folder, or ORGANISATION/NAME[@REVISION] on the Hugging Face Hub."""
    images: bool = True
    """Also read pictures and videos."""
    plot: Path | None = None
    """Draw lengths, actions and camera pictures into this folder."""
    fix: Path | None = None
    """Write a mended LeRobotDataset into this new folder, without episodes that hold NaN or are copies of others, and
    list what was changed. The dataset itself is left as it is."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Print the inspection."""
    from rich.console import Console

    from dipole.data.inspection import inspect
    from dipole.data.loading import load

    if args.fix is not None and not args.images:
        raise DipoleError("--fix writes the pictures as well: leave --no-images out")
    errors = Console(stderr=True)
    with errors.status(f"reading {args.path}"):
        episodes = load(args.path, images=args.images, allow_nan=True, stream=None)
        report = {"path": args.path, **inspect(episodes)}
        if args.plot is not None:
            from dipole.data.plots import plot

            report["plots"] = [str(file) for file in plot(episodes, report, args.plot)]
        if args.fix is not None:
            from dipole.data.repair import repair

            changes = repair(episodes, args.fix)
            report["fix"] = {"out": str(args.fix) if changes else None, "changes": [asdict(c) for c in changes]}
    if args.json:
        import json

        print(json.dumps(report, indent=1))
        return
    _show(report, Console())


def _show(report: dict[str, Any], console: Console) -> None:
    from rich.markup import escape

    lengths = report["lengths"]
    console.print(
        f"[bold]{escape(report['path'])}[/]: {report['num_episodes']} episodes, {report['num_frames']} frames, "
        f"{report['fps']:g} fps, {report['seconds'] / 60:.1f} minutes",
        soft_wrap=True,
    )
    console.print(
        f"frames per episode: {lengths['min']} to {lengths['max']}, mean {lengths['mean']:.1f}, "
        f"median {lengths['median']:g}"
    )
    if report["success"] is not None:
        console.print(f"successful episodes: {report['success']} of {report['num_episodes']}")
    for task, frames in report["tasks"].items():
        console.print(f"task: {escape(task)} ({frames} frames)", soft_wrap=True)
    console.print(_feature_table(report["features"]))
    if report["actions"]:
        console.print(_action_table(report["actions"]))
    if not report["findings"]:
        console.print("[green]no defects found[/]")
    for finding in report["findings"]:
        console.print(f"[{_COLOURS[finding['level']]}]{finding['level']}[/]: {escape(finding['text'])}", soft_wrap=True)
    if "fix" in report:
        for change in report["fix"]["changes"]:
            console.print(f"[bold]changed[/]: {escape(change['text'])}", soft_wrap=True)
        out = report["fix"]["out"]
        console.print(f"written: {escape(out)}" if out else "nothing to mend: nothing was written", soft_wrap=True)
    for file in report.get("plots", []):
        console.print(f"drawn: {escape(file)}", soft_wrap=True)


def _feature_table(features: dict[str, dict[str, Any]]) -> Any:
    """Return the table of features: smallest and largest value, and standard deviations, over all dimensions."""
    from rich import box
    from rich.table import Column, Table

    columns = [Column(name, no_wrap=True) for name in ("feature", "type", "shape", "values", "std")]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for key, row in features.items():
        shape = "x".join(str(n) for n in row["shape"])
        table.add_row(key, row["dtype"], shape, _span(row, "min", "max"), _span(row, "std", "std"))
    return table


def _span(row: dict[str, Any], low: str, high: str) -> str:
    if low not in row:
        return ""
    ends = [f"{min(row[low]):.3g}", f"{max(row[high]):.3g}"]
    return "..".join(dict.fromkeys(ends))


def _action_table(histograms: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("action", "min", "histogram", "max", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in histograms[:_DIMENSIONS_SHOWN]:
        table.add_row(row["name"], f"{row['low']:.4g}", _bars(row["counts"]), f"{row['high']:.4g}")
    rest = len(histograms) - _DIMENSIONS_SHOWN
    if rest > 0:
        table.add_row(f"({rest} more: --json or --plot)", "", "", "")
    return table


def _bars(counts: list[int]) -> str:
    """Return a histogram as block characters; a bin that holds anything at all is visible."""
    most = max(*counts, 1)
    return "".join(_BARS[0 if count == 0 else max(1, round(count / most * (len(_BARS) - 1)))] for count in counts)
