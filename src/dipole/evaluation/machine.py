"""What an evaluation ran on: machine and library versions, as recorded beside every measurement."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dipole.cores import usable_cores

_LIBRARIES = (
    "torch",
    "numpy",
    "gymnasium",
    "mujoco",
    "metaworld",
    "gym-pusht",
    "gymnasium-robotics",
    "ogbench",
    "pymunk",
)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, accelerator, threads and operating system."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, dipole and the libraries that decide a result, as far as they are installed."""
    from dipole import __version__

    found = {"python": platform.python_version(), "dipole": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
