"""Random access to the frames of a video: where each packet lies, which ones a frame needs, and decoding just those.

A video file is read through once, without decoding, when its first frame is wanted; from then on its packets are read
straight from their places and given to a decoder that belongs to the thread. A frame costs the packets from the key
frame before it, never those from the start of the file.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.formats.files import existing
from dipole.data.formats.video import TOLERANCE, Converter, av_module, open_video
from dipole.errors import DipoleError

INDEX_BYTES = 64 * 2**20
_CONTEXTS = 8


@dataclass(frozen=True)
class VideoIndex:
    """Where the packets of a video are.

    Attributes:
        path: The file.
        codec: Name of the decoder.
        extradata: What it needs before the first packet.
        time_base: Numerator and denominator of the unit of `pts`, in seconds.
        pts: int64 `[P]`, time of each packet's frame, in decoding order.
        position: int64 `[P]`, where each packet begins in the file.
        size: int32 `[P]`, bytes of each packet.
        start: int32 `[P]`, the key frame from which decoding each packet's frame must begin.
        shown: int32 `[F]`, the packets whose frames are shown, in order of time.
    """

    path: Path
    codec: str
    extradata: bytes
    time_base: tuple[int, int]
    pts: np.ndarray
    position: np.ndarray
    size: np.ndarray
    start: np.ndarray
    shown: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(array.nbytes for array in (self.pts, self.position, self.size, self.start, self.shown))

    def find(self, times: np.ndarray) -> np.ndarray:
        """Return the packets of the frames at `times` [K] (seconds), int64 `[K]`.

        Raises:
            DipoleError: There is no frame within 1e-4 s of one of them.
        """
        known = self.pts[self.shown] * self.time_base[0] / self.time_base[1]
        place = np.searchsorted(known, times - TOLERANCE)
        if (place == len(known)).any():
            first = float(times[place == len(known)][0])
            raise DipoleError(f"{self.path} ends before {first:.4f} s: it is cut short, download it again")
        wrong = known[place] > times + TOLERANCE
        if wrong.any():
            wanted, nearest = float(times[wrong][0]), float(known[place[wrong]][0])
            raise DipoleError(
                f"{self.path} has no frame at {wanted:.4f} s (the nearest after it is at {nearest:.4f} s): video and "
                "table do not belong together, or fps in info.json is wrong"
            )
        return self.shown[place].astype(np.int64)

    def stretches(self, packets: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of the runs of packets that must be decoded for `packets` [K], in rising order."""
        first = last = -1
        for packet in packets.tolist():
            key = int(self.start[packet])
            if last < 0 or key > last + 1:
                if last >= 0:
                    yield first, last
                first = key
            last = packet
        if last >= 0:
            yield first, last


def read_index(path: Path) -> VideoIndex:
    """Read the index of a video.

    Raises:
        DipoleError: It is missing or damaged, or keeps its packets in an unusual form.
    """
    av = av_module()
    try:
        with open_video(existing(path)) as container, path.open("rb", buffering=0) as file:
            stream = container.streams.video[0]
            rows: list[tuple[int, ...]] = []
            ends: list[Any] = []
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size:
                    rows.append((packet.pts, packet.pos or 0, packet.size, packet.is_keyframe, packet.is_discard))
                    ends = [ends[0] if ends else packet, packet]
            for packet in ends:
                if os.pread(file.fileno(), packet.size, packet.pos or 0) != bytes(packet):
                    raise DipoleError(f"{path} keeps its pictures in a form that cannot be streamed: load it whole")
            context = stream.codec_context
            base = stream.time_base
            known = context.codec.name, bytes(context.extradata or b""), (base.numerator, base.denominator)
    except (av.FFmpegError, EOFError, ValueError, OSError) as error:
        raise _damaged(path, error) from None
    return _index(path, *known, np.array(rows, dtype=np.int64).reshape(-1, 5))


def _index(path: Path, codec: str, extradata: bytes, time_base: tuple[int, int], rows: np.ndarray) -> VideoIndex:
    pts, position, size, key, discarded = rows.T
    keys = np.flatnonzero(key)
    if not len(keys):
        raise _damaged(path, "it has no key frame")
    number = np.searchsorted(keys, np.arange(len(pts)), side="right") - 1
    # A frame that is shown before its key frame refers to the one before that as well.
    while (early := (number > 0) & (pts[keys[np.maximum(number, 0)]] > pts)).any():
        number[early] -= 1
    start = np.where(number < 0, 0, keys[np.maximum(number, 0)])
    shown = np.flatnonzero(discarded == 0)
    shown = shown[np.argsort(pts[shown], kind="stable")]
    if (np.diff(pts[shown]) == 0).any():
        raise _damaged(path, "two frames have the same time")
    arrays = pts.copy(), position.copy(), size.astype(np.int32), start.astype(np.int32), shown.astype(np.int32)
    return VideoIndex(path, codec, extradata, time_base, *arrays)


def _damaged(path: Path, reason: object) -> DipoleError:
    words = " ".join(str(reason).split())[:120]
    return DipoleError(f"{path} cannot be decoded ({words}): the file is damaged, download it again")


class IndexCache:
    """The indices of the files in use; the least recently used is given up when they take too much memory."""

    def __init__(self, limit: int = INDEX_BYTES) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[Path, VideoIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[Path, threading.Lock] = {}

    def get(self, path: Path) -> VideoIndex:
        """Return the index of a file, which is read by one thread while others that want it wait."""
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
            reading = self._reading.setdefault(path, threading.Lock())
        with reading:
            with self._lock:
                if path in self._kept:
                    return self._kept[path]
            index = read_index(path)
            with self._lock:
                self._reading.pop(path, None)
                self._kept[path] = index
                self.nbytes += index.nbytes
                while self.nbytes > self.limit and len(self._kept) > 1:
                    self.nbytes -= self._kept.popitem(last=False)[1].nbytes
            return index


@dataclass
class Decoder:
    """The decoders of one thread; a few are kept, as files of one camera share theirs."""

    _contexts: OrderedDict[tuple[str, bytes], Any] = field(default_factory=OrderedDict)

    def decode(
        self, index: VideoIndex, packets: np.ndarray, shape: tuple[int, ...], put: Callable[[int, np.ndarray], None]
    ) -> None:
        """Decode the frames of `packets` [K], in rising order, and call `put(place in packets, uint8 [H, W, C])`.

        Raises:
            DipoleError: The file is damaged, or has frames of another size than `shape` (H, W, C).
        """
        av = av_module()
        wanted: dict[int, list[int]] = {}
        for place, pts in enumerate(index.pts[packets].tolist()):
            wanted.setdefault(pts, []).append(place)
        try:
            context, converter = self._context(index), Converter(index.path, shape)
            with index.path.open("rb", buffering=0) as file:
                for first, last in index.stretches(packets):
                    for frame in _frames(av, context, index, file.fileno(), first, last):
                        places = wanted.pop(frame.pts, None)
                        if places:
                            picture = converter.picture(frame)
                            for place in places:
                                put(place, picture)
        except (av.FFmpegError, EOFError, ValueError, OSError) as error:
            self._contexts.pop((index.codec, index.extradata), None)
            raise _damaged(index.path, error) from None
        if wanted:
            raise _damaged(index.path, f"{len(wanted)} frames did not come out of the decoder")

    def _context(self, index: VideoIndex) -> Any:
        key = index.codec, index.extradata
        context = self._contexts.pop(key, None)
        if context is None:
            context = av_module().CodecContext.create(index.codec, "r")
            context.extradata = index.extradata or None
            context.thread_count = 1  # the work is divided among decoders, not within one
        self._contexts[key] = context
        while len(self._contexts) > _CONTEXTS:
            self._contexts.popitem(last=False)
        return context


def _frames(av: Any, context: Any, index: VideoIndex, file: int, first: int, last: int) -> Iterator[Any]:
    """Yield the frames of the packets `first` to `last`, which the decoder gives back completely."""
    if context.is_open:
        context.flush_buffers()
    for number in range(first, last + 1):
        packet = av.Packet(os.pread(file, int(index.size[number]), int(index.position[number])))
        packet.pts = int(index.pts[number])
        yield from context.decode(packet)
    yield from context.decode(None)
