"""The two storages of a Minari dataset, behind one interface: arrays of one episode by name.

HDF5: `main_data.hdf5` with groups `episode_<i>`. Arrow and Parquet: `<i>/part-0.<format>` and `<i>/metadata.json`,
where actions, rewards and flags are padded by one row to the length of the observations.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dipole.data.formats.files import existing, inside, read_json
from dipole.data.formats.hdf5 import Hdf5
from dipole.data.formats.minari_spaces import Leaf
from dipole.errors import DipoleError, MissingExtraError

_MAX_INFO_DEPTH = 16
_MAX_BATCHES = 100_000
GROUPS = {"observation": "observations", "action": "actions"}

Path_ = tuple[str, ...]


class Store(Protocol):
    """Arrays of a dataset's episodes."""

    @property
    def source(self) -> Path:
        """The file or folder, for errors."""

    def numbers(self) -> list[int]:
        """Return the numbers of the episodes, rising."""

    def attributes(self, episode: int) -> dict[str, Any]:
        """Return what is noted about an episode (id, seed, options ...), nested."""

    def leaf(self, episode: int, group: str, leaf: Leaf) -> np.ndarray:
        """Return an array of the observations `[T + 1, *shape]` or actions `[T, *shape]`; pictures are decoded."""

    def series(self, episode: int, name: str) -> np.ndarray:
        """Return `rewards`, `terminations` or `truncations`, `[T]`."""

    def infos(self, episode: int) -> list[Path_]:
        """Return the paths of the infos."""

    def info(self, episode: int, path: Path_) -> np.ndarray:
        """Return one info, `[T + 1, ...]`."""


def decode_jpeg(rows: Iterable[bytes], leaf: Leaf, count: int, source: Path) -> np.ndarray:
    """Return pictures `[count, *leaf.shape]` from JPEG files, decoded with Pillow as Minari does."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "data") from None
    out = np.empty((count, *leaf.shape), np.uint8)
    height, width = leaf.shape[:2]
    for number, row in enumerate(rows):
        try:
            with Image.open(io.BytesIO(row), formats=["JPEG"]) as image:
                # The header is looked at before anything of its size is unpacked.
                if image.size != (width, height):
                    raise DipoleError(f"{source}: '{leaf.key}' has a picture of {image.size}, not {(width, height)}")
                picture = np.asarray(image)
        except (OSError, ValueError, SyntaxError, TypeError) as error:
            raise DipoleError(f"{source}: '{leaf.key}' has a damaged JPEG at row {number} ({error})") from None
        if picture.shape != leaf.shape:
            raise DipoleError(f"{source}: '{leaf.key}' has a picture {picture.shape}, its space says {leaf.shape}")
        out[number] = picture
    return out


class Hdf5Store:
    """Storage in one HDF5 file; a context manager.

    Args:
        folder: The `data` folder.
        jpeg: Whether pictures are JPEG files.
    """

    def __init__(self, folder: Path, jpeg: bool) -> None:
        self.source = inside(folder, "main_data.hdf5")
        self._jpeg = jpeg
        self._file = Hdf5(self.source)

    def __enter__(self) -> Hdf5Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def numbers(self) -> list[int]:
        """See `Store`."""
        names = [name for name in self._file.names(self._file.root) if name.startswith("episode_")]
        found = [name.removeprefix("episode_") for name in names]
        if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in found):
            raise DipoleError(f"{self.source} holds groups that are no 'episode_<number>': it is no Minari dataset")
        return sorted(int(text) for text in found)

    def _episode(self, episode: int) -> Any:
        return self._file.group(self._file.root, f"episode_{episode}")

    def attributes(self, episode: int) -> dict[str, Any]:
        """See `Store`."""
        root: dict[str, Any] = {}
        for key, value in self._file.attributes(self._episode(episode)).items():
            *parents, last = key.split("/")
            node = root
            for name in parents:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    raise DipoleError(f"{self.source}: attribute '{key}' of episode {episode} contradicts another")
            node[last] = value.item() if isinstance(value, np.generic) else value
        return root

    def leaf(self, episode: int, group: str, leaf: Leaf) -> np.ndarray:
        """See `Store`."""
        names = [GROUPS[group], *(f"_index_{part}" if isinstance(part, int) else part for part in leaf.path)]
        node = self._episode(episode)
        for name in names[:-1]:
            node = self._file.group(node, name)
        dataset = self._file.dataset(node, names[-1])
        if leaf.dtype == "string":
            return self._file.texts(dataset)
        if self._jpeg and leaf.picture:
            return decode_jpeg(self._file.blobs(dataset), leaf, dataset.shape[0], self.source)
        return self._file.numbers(dataset)

    def series(self, episode: int, name: str) -> np.ndarray:
        """See `Store`."""
        return self._file.numbers(self._file.dataset(self._episode(episode), name))

    def infos(self, episode: int) -> list[Path_]:
        """See `Store`."""
        group = self._episode(episode)
        return [*self._walk(group, ("infos",))] if "infos" in self._file.names(group) else []

    def _walk(self, parent: Any, path: Path_) -> Iterator[Path_]:
        if len(path) > _MAX_INFO_DEPTH:
            raise DipoleError(f"{self.source}: the infos are nested deeper than {_MAX_INFO_DEPTH} levels: refused")
        if not self._file.is_group(parent, path[-1]):
            yield path[1:]
            return
        group = self._file.group(parent, path[-1])
        for name in self._file.names(group):
            yield from self._walk(group, (*path, name))

    def info(self, episode: int, path: Path_) -> np.ndarray:
        """See `Store`."""
        node = self._episode(episode)
        for name in ("infos", *path[:-1]):
            node = self._file.group(node, name)
        dataset = self._file.dataset(node, path[-1])
        return self._file.texts(dataset) if self._file.is_text(dataset) else self._file.numbers(dataset)


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
