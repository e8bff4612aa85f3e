"""Pictures that stay in their files and are decoded when asked for: datasets larger than memory.

A `StreamedColumn` takes the place of an array of pictures in `Episodes`: `column[i]`, `column[[3, 7]]`, `column.take`
and `numpy.asarray(column)` decode, `column[a:b]` is another such column. `Windows` and everything else work on it as on
an array and give the same pixels, whatever the number of workers. `dipole.data.load(path, stream=True)` makes them for
LeRobotDatasets; the loader of `dipole.training` asks for batches ahead of their use.

Memory, beside the columns of numbers: the cache of decoded pictures (`Streaming.cache_mb`, 256 MiB), the batch being
gathered, at most 64 MiB of indices of video files (28 bytes per frame of the files in use, the least used given up
first), a few pictures per worker, and 20 bytes per frame and camera for times and offsets. It does not grow with the
pictures of the dataset. Measured without the cache (`benchmarks/streaming_loader.py`: two threads, batches of 32
windows of two cameras at 160 x 120): 100 MiB beyond Python and torch, for 395 MiB of decoded pictures.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dipole.cores import usable_cores
from dipole.errors import DipoleError

# Parts per worker that a request is cut into: enough that no worker waits long for the last one.
_PARTS = 4
_ITERATED = 32


@dataclass(frozen=True)
class Streaming:
    """How pictures are streamed.

    Attributes:
        workers: Threads that decode (decoding leaves Python's lock alone); None takes one per core, at most 8.
        cache_mb: Memory for decoded pictures that may be wanted again, in MiB; 0 keeps none.
    """

    workers: int | None = None
    cache_mb: float = 256.0

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= 256:
            raise DipoleError(f"workers={self.workers}: 1 to 256 threads can decode")
        if not (math.isfinite(self.cache_mb) and self.cache_mb >= 0):
            raise DipoleError(f"cache_mb={self.cache_mb}: it must be a size in MiB, 0 for no cache")


class Source(Protocol):
    """Where the pictures of a column are."""

    shape: tuple[int, ...]

    def decode(self, frames: np.ndarray, put: Callable[[int, np.ndarray], None]) -> None:
        """Decode pictures in the calling thread.

        Args:
            frames: int64 `[K]`, rising, each once.
            put: Called as `put(position in frames, uint8 [H, W, C])`, once for each.

        Raises:
            DipoleError: A file is missing or damaged; the message names it.
        """

    def close(self) -> None:
        """Close what is open."""


class Decoders:
    """The threads and the cache that the columns of a dataset share.

    Args:
        options: How to stream.
    """

    def __init__(self, options: Streaming | None = None) -> None:
        options = options or Streaming()
        self.workers = options.workers or min(8, usable_cores())
        self.cache = PictureCache(int(options.cache_mb * 2**20))
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="dipole-decode")
        self._closed = False

    def fetch(self, source: Source, frames: np.ndarray) -> np.ndarray:
        """Return the pictures numbered `frames` (any shape), uint8 `[*frames.shape, H, W, C]`.

        Raises:
            DipoleError: A file is missing or damaged, or the dataset was closed.
        """
        if self._closed:
            raise DipoleError("the dataset was closed: load it again to see its pictures")
        wanted = frames.reshape(-1)
        out = np.empty((len(wanted), *source.shape), dtype=np.uint8)
        unique, first, inverse = np.unique(wanted, return_index=True, return_inverse=True)
        absent = [k for k, frame in enumerate(unique) if not self.cache.copy_to(source, int(frame), out[first[k]])]
        self._decode(source, unique[absent], [out[first[k]] for k in absent])
        again = np.flatnonzero(first[inverse] != np.arange(len(wanted)))
        out[again] = out[first[inverse[again]]]
        return out.reshape(*frames.shape, *source.shape)

    def _decode(self, source: Source, frames: np.ndarray, targets: list[np.ndarray]) -> None:
        def job(begin: int, end: int) -> None:
            def put(position: int, picture: np.ndarray) -> None:
                np.copyto(targets[begin + position], picture)
                self.cache.add(source, int(frames[begin + position]), picture)

            source.decode(frames[begin:end], put)

        jobs = [self._pool.submit(job, begin, end) for begin, end in _parts(frames, _PARTS * self.workers)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            for waiting in jobs:
                waiting.cancel()
            wait(jobs)  # none may write into the batch any more
        for done in jobs:
            if not done.cancelled() and (error := done.exception()) is not None:
                raise error

    def close(self) -> None:
        """End the threads, and forget the cached pictures."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.cache.clear()


def _parts(frames: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of at most about `count` parts; frames that follow each other stay together."""
    size = -(-len(frames) // count)
    begin = 0
    while begin < len(frames):
        end = min(begin + size, len(frames))
        while end < len(frames) and frames[end] == frames[end - 1] + 1 and end - begin < 2 * size:
            end += 1
        yield begin, end
        begin = end


class PictureCache:
    """Decoded pictures, the least recently used given up first. Any thread may use it.

    Args:
        limit: Bytes of pictures it may hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def copy_to(self, source: Source, frame: int, out: np.ndarray) -> bool:
        """Copy a picture to `out` if it is here; return whether it is."""
        with self._lock:
            picture = self._kept.get((id(source), frame))
            if picture is None:
                return False
            self._kept.move_to_end((id(source), frame))
        np.copyto(out, picture)
        return True

    def add(self, source: Source, frame: int, picture: np.ndarray) -> None:
        """Keep a picture, which must not be changed afterwards."""
        if picture.nbytes > self.limit:
            return
        with self._lock:
            if (id(source), frame) in self._kept:
                return
            self._kept[id(source), frame] = picture
            self.nbytes += picture.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0


class StreamedColumn:
    """Pictures uint8 `[N, H, W, C]` that are decoded when they are asked for.

    Args:
        source: Where they are.
        decoders: Who decodes them.
        frames: Their numbers in the source, int64 `[N]`.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, source: Source, decoders: Decoders, frames: np.ndarray) -> None:
        self.source, self.decoders, self.frames = source, decoders, frames

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, H, W, C)`."""
        return (len(self.frames), *self.source.shape)

    @property
    def nbytes(self) -> int:
        """Size of all pictures when decoded."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> Any:
        """Return pictures as an array; for a slice, a column of them that is still in the files."""
        if isinstance(index, slice):
            return StreamedColumn(self.source, self.decoders, self.frames[index])
        if isinstance(index, tuple):
            raise TypeError("a streamed column is indexed by frames alone: column[frames][..., channel]")
        return self.decoders.fetch(self.source, np.asarray(self.frames[index]))

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _ITERATED):
            yield from self.decoders.fetch(self.source, self.frames[start : start + _ITERATED])

    def take(self, indices: np.ndarray, axis: int = 0) -> np.ndarray:
        """Return the pictures numbered `indices` (any shape): `[*indices.shape, H, W, C]`."""
        if axis != 0:
            raise ValueError("a streamed column is indexed by frames alone")
        return self.decoders.fetch(self.source, self.frames[np.asarray(indices)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.decoders.fetch(self.source, self.frames).astype(dtype or np.uint8, copy=False)

    def close(self) -> None:
        """End the threads that decode, and close the files."""
        self.decoders.close()
        self.source.close()


def concatenated(columns: Sequence[Any]) -> StreamedColumn | None:
    """Return the columns one after the other, still in the files; None when not all are streamed from one source."""
    streamed = [column for column in columns if isinstance(column, StreamedColumn)]
    if len(streamed) < len(columns) or len({id(column.source) for column in streamed}) != 1:
        return None
    frames = np.concatenate([column.frames for column in streamed])
    return StreamedColumn(streamed[0].source, streamed[0].decoders, frames)
