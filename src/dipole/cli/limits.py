"""Find the limits that a dataset's actions keep, for the guard of what is sent to a robot.

The box is the range of the demonstrations and the rate their largest change from one tick to the next, both with a
margin. Edit the file: it says what to do about a violation (clamp or refuse), and which action holds the robot still.

Examples:
  dipole limits runs/demos --out limits.json
  dipole limits lerobot/pusht --margin 0.1 --out limits.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    """Options of `dipole limits`."""

    data: tyro.conf.Positional[str]
    """Dataset: a path, or a name on the Hugging Face Hub."""
    out: Path = Path("limits.json")
    """File to write."""
    margin: float = 0.05
    """How much wider than the data the box is on each side, and how much faster than them the rate may be."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Read, find, save, print."""
    import json

    from dipole.data import load
    from dipole.safety import limits_from_episodes, write_limits
    from dipole.serialization import to_dict

    limits = limits_from_episodes(load(args.data, images=False), args.margin)
    write_limits(limits, args.out)
    if args.json:
        print(json.dumps(to_dict(limits), indent=1, allow_nan=False))
        return
    rows = zip(limits.low or (), limits.high or (), limits.max_change or (), strict=True)
    for k, (low, high, change) in enumerate(rows):
        print(f"action {k:<3d}{low:12.5g} to {high:<12.5g} at most {change:.5g} per tick")
    print(f"saved in {args.out}")
