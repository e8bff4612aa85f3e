"""The pictures of a LeRobotDataset, decoded when asked for (see `dipole.data.streaming`)."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dipole.data.features import Feature
from dipole.data.formats.lerobot_layout import Entry
from dipole.data.formats.png import Decoder as PngDecoder
from dipole.data.formats.video_index import Decoder, IndexCache
from dipole.data.streaming import Decoders, Source, StreamedColumn, Streaming
from dipole.errors import DipoleError


def columns(
    entries: Sequence[Entry], ends: np.ndarray, features: dict[str, Feature], times: np.ndarray, options: Streaming
) -> dict[str, StreamedColumn]:
    """Return a column for every feature of pictures.

    Args:
        entries: The episodes.
        ends: int64 `[E]`, their exclusive ends.
        features: All features that are read.
        times: float64 `[N]`, the time of each frame in its episode; filled in later.
        options: How to stream.
    """
    decoders, indices = Decoders(options), IndexCache()
    sources: dict[str, Source] = {}
    for key, feature in features.items():
        if feature.dtype == "video":
            sources[key] = VideoFrames([entry.videos[key] for entry in entries], ends, times, feature, indices)
        elif feature.is_image:
            sources[key] = StoredPictures(key, [entry.data for entry in entries], ends, feature)
    frames = np.arange(int(ends[-1]))
    return {key: StreamedColumn(source, decoders, frames) for key, source in sources.items()}


class VideoFrames:
    """The frames of one camera in its video files.

    Args:
        places: Per episode, its file and the time of its first frame in it.
        ends: int64 `[E]`, exclusive end of each episode.
        times: float64 `[N]`, time of each frame in its episode.
        feature: The camera.
        indices: The indices of all video files of the dataset.
    """

    def __init__(
        self,
        places: Sequence[tuple[Path, float]],
        ends: np.ndarray,
        times: np.ndarray,
        feature: Feature,
        indices: IndexCache,
    ) -> None:
        if feature.shape[2] not in (1, 3):
            raise DipoleError(f"a video feature has {feature.shape[2]} channels: 1 or 3 can be read")
        self.shape = feature.shape
        self._paths = list(dict.fromkeys(path for path, _ in places))
        number = {path: i for i, path in enumerate(self._paths)}
        self._file = np.array([number[path] for path, _ in places])
        self._shift = np.array([start for _, start in places], dtype=np.float64)
        self._ends, self._times, self._indices = ends, times, indices
        self._own = threading.local()

    def decode(self, frames: np.ndarray, put: Callable[[int, np.ndarray], None]) -> None:
        """Decode frames; see `dipole.data.streaming.Source`."""
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder()
        episode = np.searchsorted(self._ends, frames, side="right")
        times, file = self._times[frames] + self._shift[episode], self._file[episode]
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            index = self._indices.get(self._paths[number])
            packets = index.find(times[here])
            order = np.argsort(packets, kind="stable")
            rows = here[order].tolist()
            self._own.decoder.decode(index, packets[order], self.shape, partial(_put_row, put, rows))

    def close(self) -> None:
        """Nothing is held open."""


def _put_row(put: Callable[[int, np.ndarray], None], rows: list[int], place: int, picture: np.ndarray) -> None:
    put(rows[place], picture)


class StoredPictures:
    """Pictures kept inside the tables (PNG, JPEG), copied as they are into a temporary file on opening.

    A table can only be read a group of rows at a time, often hundreds of pictures; the copy, which takes the room of
    the packed pictures in `TMPDIR`, can be read one by one.

    Args:
        key: Name of the feature.
        tables: Per episode, the table it was in, for errors.
        ends: int64 `[E]`, exclusive end of each episode.
        feature: The camera.

    """

    def __init__(self, key: str, tables: Sequence[Path], ends: np.ndarray, feature: Feature) -> None:
        self.shape = feature.shape
        self._key, self._tables, self._ends = key, tables, ends
        self._decoder = PngDecoder(feature.shape)
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the column)
        self._where = np.zeros((int(ends[-1]), 2), dtype=np.int64)
        self._filled = 0

    def __setitem__(self, frames: np.ndarray, pictures: Sequence[bytes]) -> None:
        """Keep the packed pictures of some frames."""
        sizes = np.array([len(data) for data in pictures], dtype=np.int64)
        begins = self._filled + np.cumsum(sizes) - sizes
        self._where[frames] = np.stack([begins, sizes], axis=1)
        block = b"".join(pictures)
        folder = tempfile.gettempdir()
        if len(block) > shutil.disk_usage(folder).free:
            raise DipoleError(
                f"the pictures of '{self._key}' do not fit into {folder}: set TMPDIR to a larger disk, or load fewer "
                "episodes (episodes=...)"
            )
        done = 0
        while done < len(block):
            done += os.pwrite(self._file.fileno(), block[done:], self._filled + done)
        self._filled += len(block)

    def decode(self, frames: np.ndarray, put: Callable[[int, np.ndarray], None]) -> None:
        """Decode pictures; see `dipole.data.streaming.Source`."""
        for position, frame in enumerate(frames):
            begin, size = self._where[frame].tolist()
            try:
                put(position, self._decoder.decode(os.pread(self._file.fileno(), size, begin)))
            except DipoleError as error:
                table = self._tables[int(np.searchsorted(self._ends, frame, side="right"))]
                raise DipoleError(f"{table}: '{self._key}' holds {error}") from None

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()
