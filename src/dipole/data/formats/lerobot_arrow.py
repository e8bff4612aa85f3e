"""Files of a LeRobotDataset that is being written: where they lie, and numpy columns as arrow ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dipole.data.features import Feature
from dipole.data.formats import png

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200


class Tables:
    """The parquet files of frames, each closed when it has grown to 100 MB."""

    def __init__(self, root: Path, schema: pa.Schema) -> None:
        self._root = root
        self._schema = schema
        self._number = 0
        self._open()

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open(self) -> None:
        self._sink = create(self._root / place(DATA_PATH, self._number))
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="snappy")

    def _close(self) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, table: pa.Table) -> int:
        """Write an episode; return the number of its file."""
        if self._sink.tell() > DATA_FILE_MB * 2**20:
            self._close()
            self._number += 1
            self._open()
        self._writer.write_table(table)
        return self._number


def place(template: str, number: int, key: str = "") -> str:
    """Return the path of file `number`, counted over all chunks."""
    return template.format(video_key=key, chunk_index=number // FILES_PER_CHUNK, file_index=number % FILES_PER_CHUNK)


def create(path: Path) -> pa.OSFile:
    """Open a new file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return pa.OSFile(str(path), "wb")


def arrow_type(feature: Feature) -> pa.DataType:
    """Return the type of a feature's column in the tables: a number, a list of fixed size, nested lists, a picture."""
    if feature.is_image:
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = pa.string() if feature.is_string else pa.from_numpy_dtype(feature.numpy_dtype)
    if feature.shape == (1,):
        return kind
    if len(feature.shape) == 1:
        return pa.list_(kind, feature.shape[0])
    for _ in feature.shape:
        kind = pa.list_(kind)
    return kind


def hub_feature(feature: Feature) -> dict[str, Any]:
    """Return the description that the `datasets` package keeps in the table's metadata."""
    if feature.is_image:
        return {"_type": "Image"}
    value = {"dtype": feature.dtype, "_type": "Value"}
    if feature.shape == (1,):
        return value
    if len(feature.shape) == 1:
        return {"feature": value, "length": feature.shape[0], "_type": "List"}
    return {"shape": list(feature.shape), "dtype": feature.dtype, "_type": f"Array{len(feature.shape)}D"}


def to_arrow(column: np.ndarray, feature: Feature) -> pa.Array:
    """Return a column `[T, *shape]` as arrow's; pictures become PNG."""
    kind = arrow_type(feature)
    if feature.is_image:
        data = pa.array([png.encode(picture) for picture in column], pa.binary())
        return pa.StructArray.from_arrays([data, pa.nulls(len(column), pa.string())], fields=list(kind))
    if feature.shape == (1,):
        values = column[:, 0]
        return pa.array(values.tolist() if feature.is_string else values, kind)
    if len(feature.shape) == 1 and not feature.is_string:
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), feature.shape[0])
    return pa.array(column.tolist(), kind)
