"""Fetch a policy from the Hugging Face Hub into a folder, checked: the other end of `dipole push`.

The folder works wherever a checkpoint does: dipole eval, compare, export and so on. LeRobot's policies are taken over
by `dipole import` instead.

Examples:
  dipole pull my-name/peg-insert --out runs/peg
  dipole pull my-name/peg-insert --revision v1 --out runs/peg
  dipole pull ./peg-to-publish --out runs/peg
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    """Options of `dipole pull`."""

    source: tyro.conf.Positional[str]
    """ORGANISATION/NAME on the Hub, or a folder that `dipole push` wrote (./folder)."""
    out: Path
    """Policy folder to write; must not exist yet, or be empty."""
    revision: str | None = None
    """Commit, branch or tag on the Hub."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Fetch and say what it is."""
    from dipole.policies.hub import pull

    folder = pull(args.source, args.out, args.revision)
    if args.json:
        import json

        print(json.dumps({"source": args.source, "out": str(folder)}, indent=1))
        return
    print(f"{args.source} -> {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
