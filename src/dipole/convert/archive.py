"""The zip file that `torch.save` writes: `<top>/data.pkl` (a pickle) and `<top>/data/<key>` (the storages' bytes).

Nothing is decompressed and nothing is extracted: torch stores its members as they are, so a compressed member is
refused (a zip bomb needs one), and the members together may not be larger than the file (overlapping members are the
other kind of bomb).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from dipole.errors import DipoleError

MAX_MEMBERS = 200_000
MAX_PICKLE_BYTES = 256 * 2**20
_PIECE = 2**24

_COMPRESSED = "has compressed members, which torch.save never writes: refused (zip bomb?)"
_LEGACY = "is not a zip file: only files of torch.save since 1.6 are read; load and save it again where it was made"


def is_torch_zip(path: Path) -> bool:
    """Whether `path` is a zip file with a `data.pkl`, as `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


class Archive:
    """Checked, read-only access to the pickle and the storages of one checkpoint.

    Args:
        path: The checkpoint.

    Raises:
        DipoleError: The file is not such a zip, is damaged, or claims sizes that it cannot have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError):
            raise DipoleError(f"'{path.name}' {self._why_not_zip()}") from None
        self._members = self._checked_members()
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise DipoleError(f"'{path.name}' holds {len(pickles)} pickles named <top>/data.pkl: expected one")
        self._top = pickles[0].removesuffix("data.pkl")
        if f"{self._top}constants.pkl" in self._members:
            raise DipoleError(
                f"'{path.name}' is a TorchScript program, not a checkpoint: export its state_dict instead"
            )
        if f"{self._top}byteorder" in self._members and self._read(f"{self._top}byteorder").tobytes() != b"little":
            raise DipoleError(f"'{path.name}' was written on a big-endian machine: not supported")

    def _why_not_zip(self) -> str:
        with self.path.open("rb") as file:
            return "is damaged or truncated: its zip directory cannot be read" if file.read(2) == b"PK" else _LEGACY

    def _checked_members(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise DipoleError(f"'{self.path.name}' has {len(infos)} members: more than {MAX_MEMBERS} are refused")
        members = {info.filename: info for info in infos}
        if len(members) != len(infos):
            raise DipoleError(f"'{self.path.name}' has two members of the same name: refused as ambiguous")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise DipoleError(f"'{self.path.name}' {_COMPRESSED}")
        if sum(info.file_size for info in infos) > self.path.stat().st_size:
            raise DipoleError(f"'{self.path.name}' has members larger than the file itself: refused (zip bomb?)")
        return members

    def pickle(self) -> bytes:
        """Return the bytes of the pickle."""
        size = self._members[f"{self._top}data.pkl"].file_size
        if size > MAX_PICKLE_BYTES:
            raise DipoleError(f"the pickle in '{self.path.name}' has {size} bytes: at most {MAX_PICKLE_BYTES} are read")
        return self._read(f"{self._top}data.pkl").tobytes()

    def storage_bytes(self, key: str) -> int:
        """Return the size of the storage `key` in bytes."""
        name = f"{self._top}data/{key}"
        if name not in self._members:
            raise DipoleError(f"'{self.path.name}' has no storage {ascii(key)[:40]}: the file is incomplete")
        return self._members[name].file_size

    def storage(self, key: str) -> np.ndarray:
        """Return the bytes of the storage `key`, uint8 `[n]`."""
        self.storage_bytes(key)
        return self._read(f"{self._top}data/{key}")

    def total_bytes(self) -> int:
        """Return the size of all members together."""
        return sum(info.file_size for info in self._members.values())

    def _read(self, name: str) -> np.ndarray:
        buffer = np.empty(self._members[name].file_size, np.uint8)
        done = 0
        try:
            with self._zip.open(name) as member:
                # In pieces: one read of everything would need twice the memory.
                while piece := member.read(_PIECE):
                    buffer[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                    done += len(piece)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError):
            raise DipoleError(f"'{self.path.name}' is damaged in {ascii(name)[:60]}") from None
        if done != len(buffer):
            raise DipoleError(f"'{self.path.name}' is truncated in {ascii(name)[:60]}")
        return buffer
