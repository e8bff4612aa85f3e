"""Logs: an audit log without which nothing is answered, and JSON lines for people and machines.

The audit log has one JSON object per line: who connected, what was refused, which reply went to whom, by which
checkpoint. A reply is written down before it is sent; if that fails (a full disk, a removed folder), the request is
refused, and so are all others until it can be written again. Neither log ever holds a token or an observation.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from dipole.errors import DipoleError


class AuditError(Exception):
    """The audit log cannot be written."""


class AuditLog:
    """An append-only file of JSON lines, turned over when it is large.

    Attributes:
        path: The file, or None for no audit log.
        healthy: Whether the last line was written.
        written: Lines written.
    """

    def __init__(self, path: Path | None, max_bytes: int = 256 * 2**20, keep: int = 8) -> None:
        """Open the log.

        Args:
            path: The file; older ones are `path.1` (the youngest) to `path.<keep>`.
            max_bytes: Size at which it is turned over.
            keep: How many older files are kept.

        Raises:
            DipoleError: It cannot be opened.
        """
        self.path, self._max_bytes, self._keep = path, max_bytes, keep
        self.healthy, self.written = True, 0
        self._file = -1
        if path is not None:
            try:
                self._open()
            except OSError as error:
                raise DipoleError(f"{path}: the audit log cannot be written ({error.strerror})") from None

    def _open(self) -> None:
        assert self.path is not None
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def write(self, event: str, **fields: Any) -> None:
        """Write a line.

        Raises:
            AuditError: It could not be written whole.
        """
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 6), "event": event, **fields}, default=str) + "\n"
        try:
            if self._file < 0 or not self.healthy:
                self._open()
                if self._size and not self._ends_with_newline():
                    line = "\n" + line
            if self._size + len(line) > self._max_bytes:
                self._turn_over()
            data = line.encode()
            if os.write(self._file, data) != len(data):
                raise OSError(28, "written in part")
        except OSError as error:
            self.healthy = False
            raise AuditError(f"audit log: {error.strerror}") from None
        self._size += len(data)
        self.healthy, self.written = True, self.written + 1

    def _ends_with_newline(self) -> bool:
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _turn_over(self) -> None:
        assert self.path is not None
        for number in range(self._keep - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            if older.exists():
                os.replace(older, self.path.with_name(f"{self.path.name}.{number + 1}"))
        os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))
        self._open()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class JsonFormatter(logging.Formatter):
    """One JSON object per log record, a traceback (in our own log only) as a field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class SafeHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler that survives a full disk or a closed terminal; what it could not write it counts in `dropped`."""

    dropped = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a record that could not be written."""
        self.dropped += 1


def json_logger(stream: TextIO | Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Return the server's logger, writing JSON lines to a stream or file (default stderr).

    Raises:
        DipoleError: The file cannot be opened.
    """
    if isinstance(stream, Path):
        try:
            stream = stream.open("a", encoding="utf-8")
        except OSError as error:
            raise DipoleError(f"{stream}: the log cannot be written ({error.strerror})") from None
    logger = logging.getLogger("dipole.serving")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = SafeHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger
