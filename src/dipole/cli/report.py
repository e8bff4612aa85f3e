"""Write a run's report: one HTML page, rebuilt from the files of the run folder, that needs nothing but itself.

Examples:
  dipole report runs/peg
  dipole report runs/peg --out peg.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    """Options of `dipole report`."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path | None = None
    """The page (default RUN/report.html)."""


def run(args: Args) -> None:
    """Write the page."""
    from dipole.evaluation.report import write_report

    print(write_report(args.run, args.out))
