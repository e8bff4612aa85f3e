"""How many processor cores there are for this process."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return on how many cores this process may run: those of its affinity (`taskset`, a container's set of cores).

    Where the system knows no affinity (macOS), it is how many there are.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
