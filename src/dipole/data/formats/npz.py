"""Numpy archives: arrays over all frames, and where the episodes end.

Two forms: `episode_ends` [E] (diffusion_policy's convention), or `traj_lengths` [E] (DPPO and ReinFlow's `train.npz`).
DPPO's numbers are scaled to [-1, 1]; when its `normalization.npz` (`obs_min`, `obs_max`, `action_min`, `action_max`)
lies beside the file, states and actions are brought back to physical units. Names of arrays: see `raw`.
"""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.formats import raw
from dipole.data.formats.files import existing, inside
from dipole.data.storage import allocate
from dipole.errors import DipoleError

_ENDS, _LENGTHS = "episode_ends", "traj_lengths"
_READ_BYTES = 16 * 2**20
_NORMALIZATION = "normalization.npz"
# What zipfile, its decompressors and numpy's parser of headers raise for damaged bytes; RuntimeError stands for "needs
# a password", "an unknown kind of compression" (NotImplementedError) and "nested too deeply" (RecursionError).
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    OSError,
    RuntimeError,
)


def read(path: str | Path, fps: float | None = None, images: bool = True, allow_nan: bool = False) -> Episodes:
    """Read an archive. Arrays without one row per frame (such as initial states per episode) are left out.

    Args:
        path: The `.npz` file, or a folder with `train.npz`.
        fps: Frames per second; None takes 10.
        images: Whether to read pictures.
        allow_nan: Whether NaN and infinity are let through.

    Raises:
        DipoleError: The file is damaged, or does not say where episodes end.
    """
    path = inside(Path(path), "train.npz") if Path(path).is_dir() else Path(path)
    arrays = read_arrays(path)
    if _ENDS in arrays:
        ends = arrays.pop(_ENDS)
    elif _LENGTHS in arrays:
        ends = np.cumsum(arrays.pop(_LENGTHS))
    else:
        raise DipoleError(
            f"{path} holds neither '{_ENDS}' nor '{_LENGTHS}' (but {', '.join([*arrays][:8])} ...): it does not say "
            "where episodes end"
        )
    frames = int(ends[-1]) if ends.ndim == 1 and len(ends) else 0
    rows = {len(array) for array in arrays.values() if array.ndim}
    if rows and frames not in rows:
        raise DipoleError(f"{path}: the episodes have {frames} frames, but the arrays have {sorted(rows)} rows")
    for key in sorted(raw.NAMED.intersection(arrays)):
        if arrays[key].ndim == 0 or len(arrays[key]) != frames:
            rows_of = len(arrays[key]) if arrays[key].ndim else "no"
            raise DipoleError(f"{path}: '{key}' has {rows_of} rows, but the episodes have {frames} frames")
    columns = {key: array for key, array in arrays.items() if array.ndim and len(array) == frames}
    if not images:
        columns = {key: column for key, column in columns.items() if column.ndim < 4}
    beside = path.parent / _NORMALIZATION
    if "states" in columns and "actions" in columns and beside.is_file():
        columns |= _physical(columns, read_arrays(inside(path.parent, _NORMALIZATION)), beside)
    return raw.to_episodes(columns, ends, path, fps, allow_nan)


def _physical(columns: dict[str, np.ndarray], limits: dict[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    result = {}
    for name, prefix in (("states", "obs"), ("actions", "action")):
        for end in ("min", "max"):
            if f"{prefix}_{end}" not in limits or limits[f"{prefix}_{end}"].shape != columns[name].shape[1:]:
                raise DipoleError(f"{source} must hold '{prefix}_{end}' of shape {columns[name].shape[1:]}")
        low, high = limits[f"{prefix}_min"], limits[f"{prefix}_max"]
        result[name] = ((columns[name] + 1.0) / 2.0 * (high - low) + low).astype(np.float32)
    return result


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive. Nothing is unpickled; sizes are checked before memory is taken.

    Raises:
        DipoleError: The file is damaged, or an array holds Python objects.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(existing(path)) as archive:
            for item in archive.infolist():
                name = item.filename.removesuffix(".npy")
                with archive.open(item) as file:
                    arrays[name] = _read_array(file, item.file_size, f"{path}: '{name}'")
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:160]
        raise DipoleError(f"{path} is not a whole numpy archive ({reason}): copy or download it again") from None
    return arrays


def _read_array(file: IO[bytes], size: int, what: str) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject or dtype.kind not in "fiubU":
        raise DipoleError(f"{what} is of type {dtype}: only numbers and texts are read, never Python objects")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.itemsize > size:
        raise DipoleError(f"{what} announces {shape} {dtype}, more than the file holds: it is damaged")
    array = allocate((count,), dtype, what)
    target, done = array.view(np.uint8), 0
    while done < len(target):
        piece = file.read(min(_READ_BYTES, len(target) - done))
        if not piece:
            raise DipoleError(f"{what} is cut short: copy or download it again")
        target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
