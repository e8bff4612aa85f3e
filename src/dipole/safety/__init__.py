"""Safety of what is sent to a robot: limits on actions, clamped or refused, counted and reported."""

from dipole.safety.limits import Limits, Monitor, OutputGuard, RefusedError, Violation
from dipole.safety.limits_file import limits_from_episodes, limits_from_stats, read_limits, write_limits

__all__ = [
    "Limits",
    "Monitor",
    "OutputGuard",
    "RefusedError",
    "Violation",
    "limits_from_episodes",
    "limits_from_stats",
    "read_limits",
    "write_limits",
]
