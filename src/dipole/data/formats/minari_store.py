"""What the two storages of a Minari dataset have in common: arrays of one episode by name, and pictures in JPEG.

They are in `minari_hdf5` and `minari_arrow`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dipole.data.formats.minari_spaces import Leaf
from dipole.errors import DipoleError, MissingExtraError

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
