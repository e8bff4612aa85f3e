"""The Arrow and Parquet storage of a Minari dataset: `<i>/part-0.<format>` and `<i>/metadata.json`.

Actions, rewards and flags are padded by one row to the length of the observations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dipole.data.formats.files import existing, inside, read_json
from dipole.data.formats.minari_spaces import Leaf
from dipole.data.formats.minari_store import GROUPS, Path_, decode_jpeg
from dipole.errors import DipoleError

_MAX_BATCHES = 100_000


class ArrowStore:
    """Storage in one Arrow or Parquet file per episode; a context manager.

    Args:
        folder: The `data` folder.
        jpeg: Whether pictures are JPEG files.
        kind: `arrow` or `parquet`.
    """

    def __init__(self, folder: Path, jpeg: bool, kind: str) -> None:
        self.source = folder
        self._jpeg = jpeg
        self._kind = kind
        self._open: tuple[int, pa.Table] | None = None

    def __enter__(self) -> ArrowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = None

    def numbers(self) -> list[int]:
        """See `Store`."""
        names = [child.name for child in self.source.iterdir() if child.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 10)

    def attributes(self, episode: int) -> dict[str, Any]:
        """See `Store`."""
        return read_json(inside(self.source, f"{episode}/metadata.json"))

    def _table(self, episode: int) -> pa.Table:
        if self._open is None or self._open[0] != episode:
            self._open = None
            self._open = episode, self._read(episode)
        return self._open[1]

    def _read(self, episode: int) -> pa.Table:
        path = existing(inside(self.source, f"{episode}/part-0.{self._kind}"))
        if len([*path.parent.glob(f"part-*.{self._kind}")]) > 1:
            raise DipoleError(f"{path.parent} holds several parts of one episode, which Minari never writes")
        try:
            if self._kind == "parquet":
                table = pq.ParquetFile(path).read()
            else:
                with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                    if reader.num_record_batches > _MAX_BATCHES:
                        raise DipoleError(f"{path} announces {reader.num_record_batches} batches: it is damaged")
                    table = reader.read_all()
            # Offsets and sizes inside the file are not to be trusted before this.
            table.validate(full=True)
            _check_names(table.schema)
            return table.combine_chunks()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DipoleError(f"{path} is damaged ({_line(error)}): copy or download it again") from None

    def _column(self, episode: int, names: list[str]) -> pa.Array:
        table = self._table(episode)
        where = f"{self.source / str(episode)}: '{'.'.join(names)}'"
        if names[0] not in table.column_names or table.num_rows == 0:
            raise DipoleError(f"{where} is missing: the episode has {', '.join(table.column_names)}")
        array = table.column(names[0]).chunk(0)
        for name in names[1:]:
            if not pa.types.is_struct(array.type) or name not in [field.name for field in array.type]:
                raise DipoleError(f"{where} is missing: the parts are {array.type}"[:300])
            array = array.field(name)
        return array

    def leaf(self, episode: int, group: str, leaf: Leaf) -> np.ndarray:
        """See `Store`."""
        names = [GROUPS[group], *map(str, leaf.path)]
        array = self._column(episode, names)
        array = array[:-1] if group == "action" else array
        where = f"{self.source / str(episode)}: '{'.'.join(names)}'"
        if array.null_count:
            raise DipoleError(f"{where} has empty cells: the file is damaged")
        if leaf.dtype == "string":
            return _texts(array, where)
        if self._jpeg and leaf.picture:
            if not pa.types.is_binary(array.type):
                raise DipoleError(f"{where} is {array.type}: encoded pictures were expected")
            return decode_jpeg((row.as_py() for row in array), leaf, len(array), self.source)
        return _numbers(array, leaf.shape, where)

    def series(self, episode: int, name: str) -> np.ndarray:
        """See `Store`."""
        return _numbers(self._column(episode, [name])[:-1], (), f"{self.source / str(episode)}: '{name}'")

    def infos(self, episode: int) -> list[Path_]:
        """See `Store`."""
        if "infos" not in self._table(episode).column_names:
            return []
        return [*_struct_paths(self._table(episode).schema.field("infos"), ())]

    def info(self, episode: int, path: Path_) -> np.ndarray:
        """See `Store`."""
        array = self._column(episode, ["infos", *path])
        where = f"{self.source / str(episode)}: 'infos.{'.'.join(path)}'"
        field = self._table(episode).schema.field("infos")
        for name in path:
            field = field.type.field(name)
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            return _texts(array, where)
        shape = _noted_shape(field)
        return _numbers(array, _list_shape(array) if shape is None else shape, where)


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raise a UnicodeDecodeError if the name of a column, or of a part of one, is no text."""
    for field in fields:
        _ = field.name
        if pa.types.is_struct(field.type):
            _check_names(field.type)


def _struct_paths(field: pa.Field, path: Path_) -> Iterator[Path_]:
    if not pa.types.is_struct(field.type):
        yield path
        return
    for inner in field.type:
        yield from _struct_paths(inner, (*path, inner.name))


def _noted_shape(field: pa.Field) -> tuple[int, ...] | None:
    """Return the shape of one row that Minari notes as "3,4" ("" for a number); None without a note."""
    note = (field.metadata or {}).get(b"shape")
    if note is None:
        return None
    parts = [part for part in note.decode("ascii", "replace").split(",") if part]
    if not all(part.isdigit() and len(part) < 10 for part in parts):
        raise DipoleError(f"the info '{field.name}' notes an impossible shape: the file is damaged")
    return tuple(map(int, parts))


def _list_shape(array: pa.Array) -> tuple[int, ...]:
    """Return the shape of one row of lists of equal length; lists of other lengths fail in `_numbers`."""
    if not (pa.types.is_fixed_size_list(array.type) or pa.types.is_list(array.type)):
        return ()
    return (len(array[0].as_py() or ()),)


def _texts(array: pa.Array, where: str) -> np.ndarray:
    if array.null_count or not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise DipoleError(f"{where} is {array.type} with {array.null_count} empty cells: texts were expected")
    return np.array(array.to_pylist(), dtype=np.str_)


def _numbers(array: pa.Array, shape: tuple[int, ...], where: str) -> np.ndarray:
    rows = len(array)
    if pa.types.is_fixed_size_list(array.type) or pa.types.is_list(array.type):
        array = array.flatten()
    kind = array.type
    if array.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DipoleError(f"{where} is {kind} with {array.null_count} empty cells: numbers were expected")
    size = 1
    for n in shape:
        size *= n
    if len(array) != rows * size:
        raise DipoleError(f"{where} has {len(array)} numbers in {rows} rows, its space says {shape} per row")
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values.reshape(rows, *shape)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
