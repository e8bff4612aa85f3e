"""Fences around the process that reads a foreign pickle: resource limits, no network, and an audit hook.

The hook denies by default: after `lock` the process may open the one input for reading and files in the one output
folder for writing. Sockets, subprocesses, further imports, exec, ctypes and everything else that Python audits stop
with an error. A hook cannot be removed again. On Linux the process also leaves for a network namespace of its own where
the kernel lets it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipole.errors import DipoleError

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Codecs that reading a zip file and a pickle may need: looked up before the lock, since a first look-up is an import.
_CODECS = ("utf-8", "ascii", "latin-1", "raw-unicode-escape", "unicode-escape", "cp437")
# Audited by Python, but without effect (`json` and the renderer use it).
_HARMLESS = frozenset(["builtins.id"])


@dataclass(frozen=True)
class Limits:
    """What the reading process may use.

    Attributes:
        memory_bytes: Address space.
        cpu_seconds: Processor time.
        file_bytes: Largest file it may write.
    """

    memory_bytes: int
    cpu_seconds: int
    file_bytes: int


def lock(readable: Path, writable: Path, limits: Limits) -> None:
    """Fence in this process for the rest of its life.

    Args:
        readable: The one file that may be read.
        writable: The one folder where files may be written.
        limits: Resource limits.
    """
    import codecs

    for name in _CODECS:
        codecs.lookup(name)
    _limit_resources(limits)
    _leave_network()
    sys.addaudithook(_hook(os.fspath(readable.resolve()), os.fspath(writable.resolve())))


def _limit_resources(limits: Limits) -> None:
    try:
        import resource
    except ImportError:
        raise DipoleError(
            "foreign checkpoints can only be read where processes can be limited (Linux, macOS)"
        ) from None
    wanted = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            # macOS does not let a process lower its address space; the wall clock and the hook remain.
            if sys.platform == "linux":
                raise DipoleError(f"cannot limit {name} of the process that reads the checkpoint") from None


def _leave_network() -> None:
    if sys.platform == "linux":
        # Fails without consequence where unprivileged namespaces are switched off: the hook denies sockets anyway.
        ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _hook(readable: str, writable: str) -> Any:
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _HARMLESS:
            return
        if event != "open":
            raise DipoleError(f"the checkpoint's reader tried '{event}': refused")
        path, _, flags = arguments
        if not isinstance(path, str):
            raise DipoleError("the checkpoint's reader tried to open something other than a named file: refused")
        if flags & _WRITE_FLAGS:
            if os.path.dirname(path) != writable:
                raise DipoleError("the checkpoint's reader tried to write outside its folder: refused")
        elif path != readable:
            raise DipoleError("the checkpoint's reader tried to read another file: refused")

    return audit
