"""Video through PyAV (extra `data`): frames by their time, and a writer of constant frame rate."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dipole.errors import DipoleError, MissingExtraError

# Largest difference between a row's time and its frame's, in seconds (LeRobot's `tolerance_s`).
TOLERANCE = 1e-4

# codec name for people -> (FFmpeg's encoder, its options). A short group of pictures makes any frame quick to reach.
CODECS = {
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "svtav1-params": "lp=1"}),
    "h264": ("libx264", {"g": "2", "crf": "18", "forced-idr": "1"}),
}
_FORMAT = {1: "gray", 3: "rgb24"}


def av_module() -> ModuleType:
    """Return PyAV, or raise the error that says how to install it."""
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "data") from None
    return av


def open_video(path: Path) -> Any:
    """Open a video file for reading, a context manager. Titles and the like, which no one reads, may be of any bytes.

    Raises:
        av.FFmpegError: It is damaged.
        DipoleError: It holds no pictures.
    """
    container = av_module().open(str(path), metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise DipoleError(f"{path} holds no video")
    return container


class Converter:
    """Turns decoded frames into pictures uint8 `[H, W, C]`.

    One is kept for a whole video: setting up FFmpeg's scaler costs far more than using it, and its threads cost more
    than they save at camera sizes.

    Args:
        path: The video, for errors.
        shape: `(H, W, C)` of the pictures, C 1 or 3.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        from av.video.reformatter import VideoReformatter

        if shape[2] not in _FORMAT:
            raise DipoleError(f"a video feature has {shape[2]} channels: 1 or 3 can be read")
        self._path, self._shape = path, shape
        self._reformatter = VideoReformatter()

    def picture(self, frame: Any) -> np.ndarray:
        """Return a frame's picture.

        Raises:
            DipoleError: It is of another size.
        """
        if (frame.height, frame.width) != self._shape[:2]:
            size = f"{frame.height} x {frame.width}"
            raise DipoleError(f"{self._path} has frames of {size}, its feature says {self._shape}")
        scaled = self._reformatter.reformat(frame, format=_FORMAT[self._shape[2]], threads=1)
        return np.ascontiguousarray(scaled.to_ndarray()).reshape(self._shape)


def read_frames(path: Path, times: np.ndarray, out: np.ndarray) -> None:
    """Decode the frames shown at `times` into `out`.

    Args:
        path: The video.
        times: float64 `[K]`, seconds, rising.
        out: uint8 `[K, H, W, C]`, C 1 or 3; written in place, one frame at a time.

    Raises:
        DipoleError: The file is damaged, has frames of another size, or none within 1e-4 s of a wanted time.
    """
    av = av_module()
    try:
        with open_video(path) as container:
            _copy_frames(container, path, times, out)
    except (av.FFmpegError, EOFError) as error:
        raise DipoleError(f"{path} cannot be decoded ({error}): the file is damaged, download it again") from None


def _copy_frames(container: Any, path: Path, times: np.ndarray, out: np.ndarray) -> None:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    wanted, converter = 0, Converter(path, out.shape[1:])
    for frame in _frames_from(container, stream, float(times[0])):
        if wanted == len(times):
            return
        now = float(frame.pts * stream.time_base)
        picture = None
        while wanted < len(times) and times[wanted] <= now + TOLERANCE:
            if times[wanted] < now - TOLERANCE:
                raise DipoleError(
                    f"{path} has no frame at {times[wanted]:.4f} s (the nearest after it is at {now:.4f} s): video and "
                    "table do not belong together, or fps in info.json is wrong"
                )
            picture = converter.picture(frame) if picture is None else picture
            out[wanted] = picture
            wanted += 1
    if wanted < len(times):
        raise DipoleError(f"{path} ends before {times[wanted]:.4f} s: it is cut short, download it again")


def _frames_from(container: Any, stream: Any, start: float) -> Iterator[Any]:
    """Yield the frames in order of time, from the last key frame at or before `start`."""
    if start > 0:
        container.seek(int(start / stream.time_base), stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts is not None:
            yield frame


def write_frames(
    path: Path, frames: Iterable[np.ndarray], fps: float, codec: str, starts: Collection[int] = ()
) -> None:
    """Write pictures as a video of constant frame rate.

    Args:
        path: The file, `.mp4`.
        frames: uint8 `[H, W, 3]` each; H and W even.
        fps: Frames per second.
        codec: A name in `CODECS`.
        starts: Numbers of frames that must be key frames, such as the first of each episode: there the file can be cut
            without decoding, and no picture after one depends on a picture before it.

    Raises:
        DipoleError: The encoder is missing in this build of PyAV, or refuses the pictures.
    """
    av = av_module()
    name, options = CODECS[codec]
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints a page per file otherwise
    rate = Fraction(fps).limit_denominator(1001)
    frames = iter(frames)
    first = next(frames)
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(name, rate=rate, options=options)
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.time_base = 1 / rate
            for number, picture in enumerate(_chain(first, frames)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
                if number in starts:
                    frame.pict_type = av.video.frame.PictureType.I
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        raise DipoleError(f"{path}: encoding with {name} failed ({error}): choose another codec, or images") from None


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest
