"""Safety of what is sent to a robot: limits on actions, clamped or refused, counted and reported."""

from dipole.safety.guard import Monitor, OutputGuard, RefusedError
from dipole.safety.limits import Limits, Violation
from dipole.safety.limits_file import limits_from_episodes, limits_from_stats, read_limits, write_limits
from dipole.safety.monitor import STLMonitor
from dipole.safety.monitor_file import read_monitor

__all__ = [
    "Limits",
    "Monitor",
    "OutputGuard",
    "RefusedError",
    "STLMonitor",
    "Violation",
    "limits_from_episodes",
    "limits_from_stats",
    "read_limits",
    "read_monitor",
    "write_limits",
]
