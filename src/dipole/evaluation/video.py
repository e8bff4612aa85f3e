"""Videos of episodes: H.264 files, several episodes tiled into one picture, and embedding in a page."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dipole.errors import DipoleError, MissingExtraError

MAX_SIDE = 256
"""Longest side of a kept frame, in pixels: a 500-step episode then takes at most 100 MB."""

GOOD, BAD = (38, 160, 105), (200, 60, 50)


def shrink(frame: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """Return a frame `[H, W, 3]` averaged down by a whole factor until no side is longer than `max_side`."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"a frame is uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    factor = math.ceil(max(frame.shape[:2]) / max_side)
    if factor == 1:
        return frame.copy()  # simulators reuse their buffer
    height, width = frame.shape[0] // factor, frame.shape[1] // factor
    pixels = frame[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    small: np.ndarray = np.rint(pixels.mean(axis=(1, 3))).astype(np.uint8)
    return small


def enlarge(frames: np.ndarray, min_side: int = 192) -> np.ndarray:
    """Repeat pixels of `[L, H, W, 3]` until the shorter side has `min_side`: H.264 halves the colour resolution."""
    factor = math.ceil(min_side / min(frames.shape[1:3]))
    return frames if factor <= 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def tile(
    videos: Sequence[np.ndarray], successes: Sequence[bool] | None = None, columns: int | None = None
) -> np.ndarray:
    """Put several videos of equal frame size side by side.

    A video that ends earlier keeps its last frame, framed green or red if `successes` says how it ended.

    Args:
        videos: Each uint8 `[L_i, H, W, 3]`.
        successes: Outcome of each.
        columns: Videos per row; default about square.

    Returns:
        uint8 `[max L_i + 1, rows * H, columns * W, 3]`.
    """
    if not videos:
        raise ValueError("no videos to tile")
    columns = columns or math.ceil(math.sqrt(len(videos)))
    length = max(len(video) for video in videos) + 1
    height, width = videos[0].shape[1:3]
    canvas = np.zeros((length, math.ceil(len(videos) / columns) * height, columns * width, 3), np.uint8)
    for k, video in enumerate(videos):
        last = video[-1].copy()
        if successes is not None:
            _frame(last, GOOD if successes[k] else BAD)
        top, left = k // columns * height, k % columns * width
        cell = canvas[:, top : top + height, left : left + width]
        cell[: len(video)], cell[len(video) :] = video, last
    return canvas


def _frame(image: np.ndarray, colour: tuple[int, int, int]) -> None:
    border = max(2, min(image.shape[:2]) // 48)
    for edge in (image[:border], image[-border:], image[:, :border], image[:, -border:]):
        edge[...] = colour


def write_mp4(path: Path, frames: np.ndarray, fps: float, quality: int = 27) -> None:
    """Write an H.264 file that browsers play, atomically.

    Args:
        path: Where to.
        frames: uint8 `[L, H, W, 3]`; small ones are enlarged, odd sides lose a pixel.
        fps: Frames per second.
        quality: Constant rate factor, lower is better and larger.

    Raises:
        DipoleError: The encoder failed or the folder cannot be written.
        MissingExtraError: imageio-ffmpeg is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise MissingExtraError("imageio-ffmpeg", "report") from None
    frames = enlarge(frames)
    frames = np.ascontiguousarray(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2])
    options = ["-crf", str(quality), "-preset", "veryfast", "-movflags", "+faststart", "-threads", "1"]
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".mp4")
        os.close(handle)
        writer = imageio_ffmpeg.write_frames(
            temporary, (frames.shape[2], frames.shape[1]), fps=fps, codec="libx264", quality=None,
            output_params=options, macro_block_size=2, ffmpeg_log_level="error",
        )  # fmt: skip
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise DipoleError(f"{path}: the video could not be written ({error})") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def embed(path: Path, mime: str = "video/mp4") -> str:
    """Return a file as a `data:` address for use in a page."""
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
