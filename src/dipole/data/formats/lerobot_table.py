"""The frame tables of a LeRobotDataset: arrow columns to numpy, checked against the features."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dipole.data.features import Feature
from dipole.data.formats.files import existing
from dipole.errors import DipoleError

# What pyarrow raises for damaged files; names of columns that are no UTF-8 come as they are.
PARQUET_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file, or raise a DipoleError that names it."""
    existing(path)
    try:
        return pq.ParquetFile(path)
    except PARQUET_DAMAGE as error:
        raise DipoleError(f"{path} is not a whole parquet file ({_line(error)}): download it again") from None


class Table:
    """One parquet file of frames.

    Args:
        path: The file.
        features: The columns that will be read.
        packed: Those whose pictures are given as they are stored, not decoded.

    Raises:
        DipoleError: The file is damaged, or a column is missing.
    """

    def __init__(self, path: Path, features: Mapping[str, Feature], packed: Collection[str] = ()) -> None:
        self.path = path
        self._file = open_parquet(path)
        present = self._file.schema_arrow.names
        self._keys = list(dict.fromkeys(["episode_index", "frame_index", "timestamp", *features]))
        absent = [key for key in self._keys if key not in present]
        if absent:
            raise DipoleError(f"{path} has no column '{absent[0]}': it has {', '.join(present)}")
        self._decoders = {}
        self._packed = frozenset(packed)
        for key, feature in features.items():
            if feature.is_image and key not in self._packed:
                from dipole.data.formats.png import Decoder

                self._decoders[key] = Decoder(feature.shape)

    def batches(self, rows: int) -> Iterator[Batch]:
        """Yield the table in pieces of at most `rows` frames."""
        try:
            for piece in self._file.iter_batches(batch_size=rows, columns=self._keys):
                yield Batch(self, piece)
        except PARQUET_DAMAGE as error:
            raise DipoleError(f"{self.path} is damaged ({_line(error)}): download it again") from None


class Batch:
    """Some rows of a table."""

    def __init__(self, table: Table, piece: pa.RecordBatch) -> None:
        self._table = table
        self._piece = piece

    def integers(self, key: str) -> np.ndarray:
        """Return a column of whole numbers, int64 [rows]."""
        column = self._column(key)
        if not pa.types.is_integer(column.type):
            raise DipoleError(f"{self._table.path}: '{key}' is {column.type}, it must be an integer")
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)

    def timestamps(self) -> np.ndarray:
        """Return the time of every row in its episode, float64 [rows], seconds."""
        times = self.values("timestamp", Feature("float64", (1,)), np.arange(len(self._piece)))[:, 0]
        if not np.isfinite(times).all():
            raise DipoleError(f"{self._table.path}: 'timestamp' holds NaN or infinity: the file is damaged")
        return times

    def values(self, key: str, feature: Feature, rows: np.ndarray) -> np.ndarray:
        """Return the given rows of a column: `[len(rows), *shape]`; texts are `[len(rows)]` Python strings.

        Pictures of a `packed` column are `[len(rows)]` bytes.
        """
        column = self._column(key)
        if len(rows) != len(self._piece):
            column = column.take(pa.array(rows))
        if feature.is_image:
            packed = self._packed_pictures(key, column)
            return packed if key in self._table._packed else self._pictures(key, packed, feature)
        if feature.is_string:
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise DipoleError(f"{self._table.path}: '{key}' is {column.type}, its feature says string")
            return np.array(column.to_pylist(), dtype=object)
        return self._numbers(key, column, feature)

    def _column(self, key: str) -> pa.Array:
        column = self._piece.column(self._piece.schema.get_field_index(key))
        if column.null_count:
            raise DipoleError(f"{self._table.path}: '{key}' has {column.null_count} empty cells: the file is damaged")
        return column.storage if isinstance(column, pa.ExtensionArray) else column

    def _numbers(self, key: str, column: pa.Array, feature: Feature) -> np.ndarray:
        rows, sizes = len(column), feature.shape
        if feature.shape == (1,) and not _is_list(column.type):
            sizes = ()
        for size in sizes:
            if not _is_list(column.type):
                self._refuse(key, f"{column.type}", feature)
            found = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            wrong = found[found != size]
            if len(wrong):
                self._refuse(key, f"rows of {int(wrong[0])}", feature)
            column = column.flatten()
            if column.null_count:
                raise DipoleError(f"{self._table.path}: '{key}' has empty values: the file is damaged")
        kind, wanted = column.type, feature.numpy_dtype
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            self._refuse(key, str(kind), feature)
        values: np.ndarray = column.to_numpy(zero_copy_only=False)
        if not np.can_cast(values.dtype, wanted, casting="same_kind"):
            self._refuse(key, str(kind), feature)
        return values.astype(wanted, copy=False).reshape(rows, *feature.shape)

    def _refuse(self, key: str, found: str, feature: Feature) -> None:
        raise DipoleError(
            f"{self._table.path}: '{key}' holds {found}, but meta/info.json says {feature.dtype} {feature.shape}: "
            "table and description do not belong together"
        )

    def _packed_pictures(self, key: str, column: pa.Array) -> np.ndarray:
        if not pa.types.is_struct(column.type) or "bytes" not in [field.name for field in column.type]:
            raise DipoleError(f"{self._table.path}: '{key}' is {column.type}, it must hold pictures (bytes, path)")
        stored = column.field("bytes")
        if not (pa.types.is_binary(stored.type) or pa.types.is_large_binary(stored.type)):
            raise DipoleError(f"{self._table.path}: '{key}' holds {stored.type}, it must hold pictures as bytes")
        if stored.null_count:
            raise DipoleError(
                f"{self._table.path}: '{key}' names picture files instead of holding them: convert it to v3.0"
            )
        packed = np.empty(len(stored), dtype=object)
        packed[:] = stored.to_pylist()
        return packed

    def _pictures(self, key: str, packed: np.ndarray, feature: Feature) -> np.ndarray:
        decoder = self._table._decoders[key]
        images = np.empty((len(packed), *feature.shape), dtype=np.uint8)
        for row, data in enumerate(packed):
            try:
                images[row] = decoder.decode(data)
            except DipoleError as error:
                raise DipoleError(f"{self._table.path}: '{key}' holds {error}") from None
        return images


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
