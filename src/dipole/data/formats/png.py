"""PNG pictures embedded in datasets. Writing needs zlib alone; reading goes through PyAV (extra `data`)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from dipole.errors import DipoleError, MissingExtraError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPE = {1: 0, 3: 2, 4: 6}
_FORMAT = {1: "gray", 3: "rgb24", 4: "rgba"}


def encode(image: np.ndarray) -> bytes:
    """Return a picture uint8 `[H, W, 1, 3 or 4]` as PNG, losslessly.

    Rows are stored as differences to the row above (filter "up"), which shrinks camera pictures well at little cost.
    """
    height, width, channels = image.shape
    if channels not in _COLOR_TYPE:
        raise DipoleError(f"a picture has {channels} channels: PNG can hold 1, 3 or 4")
    rows = image.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPE[channels], 0, 0, 0)
    data = zlib.compress(filtered.tobytes(), 1)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class Decoder:
    """Decodes PNG (and JPEG) pictures of one known size.

    Args:
        shape: `(H, W, C)` of every picture; a picture that announces another size is refused before it is unpacked.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        try:
            import av
        except ImportError:
            raise MissingExtraError("av", "data") from None
        if shape[2] not in _FORMAT:
            raise DipoleError(f"a picture feature has {shape[2]} channels: 1, 3 or 4 can be read")
        self._av = av
        self._shape = shape

    def decode(self, data: bytes) -> np.ndarray:
        """Return the picture uint8 `[H, W, C]`.

        Raises:
            DipoleError: The bytes are no picture, damaged, or of another size.
        """
        # A codec kept for the next picture would add this one to it: FFmpeg takes PNG packets as differences.
        codec: Any = self._av.CodecContext.create(self._codec_name(data), "r")
        try:
            frames = codec.decode(self._av.Packet(data))
        except self._av.FFmpegError as error:
            raise DipoleError(f"a damaged picture ({error.strerror})") from None
        if len(frames) != 1:
            raise DipoleError("a damaged picture (it holds no frame)")
        image: np.ndarray = frames[0].to_ndarray(format=_FORMAT[self._shape[2]], threads=1)
        image = image.reshape(*image.shape[:2], -1)
        if image.shape != self._shape:
            raise DipoleError(f"a picture of shape {image.shape}, its feature says {self._shape}")
        return image

    def _codec_name(self, data: bytes) -> str:
        if data[:8] == _SIGNATURE and len(data) > 33:
            width, height = struct.unpack(">II", data[16:24])
            if (height, width) != self._shape[:2]:
                raise DipoleError(f"a picture of size {height} x {width}, its feature says {self._shape}")
            return "png"
        if data[:3] == b"\xff\xd8\xff":
            return "mjpeg"
        raise DipoleError("a picture that is neither PNG nor JPEG")
