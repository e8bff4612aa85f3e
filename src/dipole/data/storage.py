"""Arrays that may be larger than memory: a column above a limit lives in a temporary memory-mapped file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from dipole.errors import DipoleError

MEMORY_LIMIT_VARIABLE = "DIPOLE_COLUMN_MEMORY_MB"
DEFAULT_LIMIT_MB = 1024


def memory_limit() -> int:
    """Return the size in bytes above which a column goes to disk (`DIPOLE_COLUMN_MEMORY_MB`, default 1024)."""
    text = os.environ.get(MEMORY_LIMIT_VARIABLE, str(DEFAULT_LIMIT_MB))
    try:
        return int(float(text) * 2**20)
    except ValueError:
        raise DipoleError(f"{MEMORY_LIMIT_VARIABLE}='{text}' is not a number of megabytes") from None


def picture_budget() -> int:
    """Return the bytes that decoded pictures may take before they are streamed: half of what this process may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: cgroups v2, v1
        limit = Path("/sys/fs/cgroup") / name
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total // 2


def allocate(shape: tuple[int, ...], dtype: np.dtype, what: str = "array") -> np.ndarray:
    """Return an uninitialised array, in memory or, above `memory_limit()`, in a temporary file.

    The file is in the system's temporary directory (`TMPDIR`), has no name, and disappears with the last reference.

    Args:
        shape: Shape of the array.
        dtype: Its type.
        what: Name used in the error.

    Raises:
        DipoleError: The array does not fit on the disk.
    """
    dtype = np.dtype(dtype)
    # Python integers: sizes read from a damaged file must not overflow.
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= int(n)
    if nbytes <= memory_limit():
        return np.empty(shape, dtype)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DipoleError(
            f"{what} needs {nbytes / 2**30:.1f} GiB but {folder} has {free / 2**30:.1f} GiB free: "
            "load fewer episodes (episodes=...), or set TMPDIR to a larger disk"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=shape)
