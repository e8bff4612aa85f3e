"""Just enough drawing for pictures of micro environments: discs, lines and boxes with soft edges, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Colour = tuple[int, int, int]
Point = Sequence[Any] | np.ndarray
WHITE, BLACK, GREY = (255, 255, 255), (30, 30, 30), (200, 200, 200)
RED, GREEN, BLUE, ORANGE = (214, 69, 65), (87, 166, 74), (59, 110, 189), (236, 151, 31)


class Canvas:
    """A square picture of a piece of the plane.

    Args:
        low: Left and lower edge of the piece.
        high: Right and upper edge.
        size: Side of the picture in px.
    """

    def __init__(self, low: tuple[float, float], high: tuple[float, float], size: int = 192) -> None:
        self._pixel = max(high[0] - low[0], high[1] - low[1]) / size
        steps = (np.arange(size) + 0.5) * self._pixel
        self._x, self._y = (low[0] + steps)[None, :], (low[1] + steps)[::-1, None]
        self._image = np.full((size, size, 3), WHITE, dtype=np.float64)

    def _blend(self, outside: np.ndarray, colour: Colour) -> None:
        """Paint where the signed distance `outside` is negative, fading over one pixel."""
        weight = np.clip(0.5 - outside / self._pixel, 0, 1)[..., None]
        self._image = (1 - weight) * self._image + weight * np.array(colour, dtype=np.float64)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        """Draw a filled disc."""
        self._blend(np.hypot(self._x - centre[0], self._y - centre[1]) - radius, colour)

    def ring(self, centre: Point, radius: float, width: float, colour: Colour) -> None:
        """Draw a circle of line width `width`."""
        self._blend(np.abs(np.hypot(self._x - centre[0], self._y - centre[1]) - radius) - width / 2, colour)

    def box(self, low: Point, high: Point, colour: Colour) -> None:
        """Draw a filled box along the axes."""
        dx = np.maximum(low[0] - self._x, self._x - high[0])
        dy = np.maximum(low[1] - self._y, self._y - high[1])
        self._blend(np.maximum(dx, dy), colour)

    def line(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a line with round ends."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        square = dx * dx + dy * dy
        along = ((self._x - start[0]) * dx + (self._y - start[1]) * dy) / square if square > 0 else np.zeros((1, 1))
        along = np.clip(along, 0, 1)
        gap = np.hypot(self._x - start[0] - along * dx, self._y - start[1] - along * dy)
        self._blend(gap - width / 2, colour)

    def image(self) -> np.ndarray:
        """Return the picture, uint8 `[size, size, 3]`."""
        return self._image.round().astype(np.uint8)
