"""What a column of a dataset holds: its type, its shape and the names of its components (LeRobot's vocabulary)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dipole.errors import DipoleError

OBSERVATION = "observation."
ACTION = "action"
REWARD = "next.reward"
DONE = "next.done"
TRUNCATED = "next.truncated"
SUCCESS = "next.success"
TASK_INDEX = "task_index"

# Present in every LeRobot file; `Episodes` derives them from its ends and its frame rate.
IMPLICIT = ("timestamp", "frame_index", "episode_index", "index")

_NUMERIC_KINDS = "fiub"


def single_precision(value: np.ndarray) -> np.ndarray:
    """Return float64, in which simulators, robomimic and Minari count, as float32: networks have no other.

    Arrays of other types are returned as they are.
    """
    return value.astype(np.float32) if value.dtype == np.float64 else value


@dataclass(frozen=True)
class Feature:
    """One column of a dataset.

    Attributes:
        dtype: A numpy name (`float32`, `int64`, `bool` ...), or `image` / `video` (arrays are uint8), or `string`.
        shape: Shape of one frame; `(1,)` for a number, `(H, W, C)` for an image.
        names: Names of the components, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.names is not None:
            object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        if any(n < 1 for n in self.shape):
            raise DipoleError(f"a feature has shape {self.shape}: every size must be at least 1")
        if self.is_image and len(self.shape) != 3:
            raise DipoleError(f"an {self.dtype} feature has shape {self.shape}: it must be (height, width, channels)")
        if not (self.is_image or self.is_string):
            try:
                known = np.dtype(self.dtype).kind in _NUMERIC_KINDS
            except TypeError:
                known = False
            if not known:
                raise DipoleError(f"unknown feature dtype '{self.dtype}': a numpy number type, image, video or string")

    @property
    def is_image(self) -> bool:
        """Whether frames are pictures (stored one by one, or as a video)."""
        return self.dtype in ("image", "video")

    @property
    def is_string(self) -> bool:
        """Whether frames are texts."""
        return self.dtype == "string"

    @property
    def size(self) -> int:
        """Number of components of one frame."""
        return int(np.prod(self.shape, dtype=np.int64))

    def accepts(self, array: np.ndarray) -> bool:
        """Whether `array` [N, *shape] is of this feature's type and shape."""
        if array.shape[1:] != self.shape:
            return False
        if self.is_image:
            return array.dtype == np.uint8
        return array.dtype.kind == "U" if self.is_string else array.dtype == np.dtype(self.dtype)

    @property
    def numpy_dtype(self) -> np.dtype:
        """Type of the array: uint8 for images, unicode for strings."""
        if self.is_image:
            return np.dtype(np.uint8)
        return np.dtype(np.str_) if self.is_string else np.dtype(self.dtype)
