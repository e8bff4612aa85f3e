"""Videos cut and joined without decoding: packets are copied, so no picture changes (PyAV, extra `data`)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.formats import video
from dipole.data.formats.files import existing
from dipole.errors import DipoleError

# Video files hold times in fractions of a second that need not hit a frame's time exactly.
_HALF_FRAME = 0.5


def cut(source: Path, start: float, count: int, fps: float, out: Path) -> bool:
    """Write `count` frames of a video, from time `start` on, as a video that starts at 0.

    Args:
        source: The video.
        start: Time of the first frame, seconds.
        count: Number of frames.
        fps: Frames per second.
        out: The file to write.

    Returns:
        Whether packets were copied. When the stretch does not start at a key frame, or is not a run of whole packets,
        it is decoded and encoded again (H.264 stays H.264, all else becomes AV1), which changes pictures a little.

    Raises:
        DipoleError: The video is damaged or too short.
    """
    av = video.av_module()
    try:
        with video.open_video(existing(source)) as container:
            stream = container.streams.video[0]
            packets = _stretch(container, stream, start, count, fps)
            if packets is not None:
                shift = min(packet.pts for packet in packets)
                with av.open(str(out), "w") as target:
                    copy = target.add_stream_from_template(stream, opaque=True)
                    _mux(target, copy, packets, -shift)
                return True
            codec = "h264" if stream.codec_context.name == "h264" else "av1"
            height, width = stream.height, stream.width
    except (av.FFmpegError, EOFError, ValueError) as error:
        raise DipoleError(f"{source} cannot be cut ({error}): the file is damaged, download it again") from None
    frames = np.empty((count, height, width, 3), np.uint8)
    video.read_frames(source, start + np.arange(count) / fps, frames)
    video.write_frames(out, iter(frames), fps, codec)
    return False


def _stretch(container: Any, stream: Any, start: float, count: int, fps: float) -> list[Any] | None:
    """Return the packets of a stretch in decoding order, or None when it cannot stand alone."""
    first, end = start - _HALF_FRAME / fps, start + (count - _HALF_FRAME) / fps
    container.seek(max(0, int(start / stream.time_base)), stream=stream, backward=True)
    packets: list[Any] = []
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        now = float(packet.pts * stream.time_base)
        if first <= now < end:
            packets.append(packet)
        elif packets and len(packets) < count:
            # A frame of elsewhere in between: pictures of the stretch may refer to it.
            return None
        if len(packets) == count:
            break
    whole = len(packets) == count and packets[0].is_keyframe
    return packets if whole and packets[0].pts == min(packet.pts for packet in packets) else None


def _mux(target: Any, copy: Any, packets: Sequence[Any], shift: int) -> None:
    for packet in packets:
        packet.pts += shift
        packet.dts = None if packet.dts is None else packet.dts + shift
        packet.stream = copy
        target.mux(packet)


class Joiner:
    """Appends whole videos to one file; a context manager.

    Args:
        out: The file to write.
        fps: Frames per second of all of them.

    Attributes:
        frames: Frames appended so far.
        nbytes: Their size in the file.
    """

    def __init__(self, out: Path, fps: float) -> None:
        self._out = out
        self._rate = Fraction(fps).limit_denominator(1001)
        self._target: Any = None
        self._stream: Any = None
        self._form: tuple[Any, ...] = ()
        self.frames = 0
        self.nbytes = 0

    def __enter__(self) -> Joiner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._target is not None:
            self._target.close()

    def append(self, source: Path, count: int) -> bool:
        """Append a video of `count` frames; return False (and write nothing) when it is of another form than the first.

        Raises:
            DipoleError: The video is damaged, or has another number of frames.
        """
        av = video.av_module()
        try:
            with video.open_video(existing(source)) as container:
                stream = container.streams.video[0]
                context = stream.codec_context
                form = (context.name, context.width, context.height, context.pix_fmt, bytes(context.extradata or b""))
                packets = [packet for packet in container.demux(stream) if packet.pts is not None]
                if len(packets) != count:
                    raise DipoleError(f"{source} has {len(packets)} frames, but its episode has {count}")
                if self._target is None:
                    self._target = av.open(str(self._out), "w")
                    self._stream = self._target.add_stream_from_template(stream, opaque=True)
                    self._form = form
                elif form != self._form:
                    return False
                begin = min(packet.pts for packet in packets)
                offset = round(self.frames / self._rate / stream.time_base)
                _mux(self._target, self._stream, packets, offset - begin)
        except (av.FFmpegError, EOFError, ValueError) as error:
            raise DipoleError(f"{source} cannot be joined ({error}): the file is damaged, download it again") from None
        self.frames += count
        self.nbytes += sum(packet.size for packet in packets)
        return True
