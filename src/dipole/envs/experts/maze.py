"""Waypoints through a maze: breadth-first search over cells, and a controller that follows them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

import numpy as np

from dipole.envs.spec import Observation

Cell = tuple[int, int]


class Maze:
    """A grid of free cells and walls in the plane.

    Args:
        cells: Rows of the map; 1 is a wall, anything else is free.
        unit: Side of a cell.
        origin: Centre of the cell in row 0 and column 0.
        down: Whether y falls from row to row (as in gymnasium-robotics) or rises (as in OGBench).
    """

    def __init__(self, cells: Sequence[Sequence[object]], unit: float, origin: Sequence[float], down: bool) -> None:
        self._free = np.array([[cell != 1 for cell in row] for row in cells])
        self._unit, self._origin, self._down = unit, np.asarray(origin, dtype=np.float64), -1.0 if down else 1.0
        self.distances = functools.cache(self._distances)

    def cell(self, xy: np.ndarray) -> Cell:
        """Return row and column of the cell that holds the point `xy`."""
        x, y = (np.asarray(xy, dtype=np.float64) - self._origin) / self._unit
        return round(self._down * y), round(x)

    def centre(self, cell: Cell) -> np.ndarray:
        """Return the centre of a cell `[2]`."""
        return self._origin + self._unit * np.array([cell[1], self._down * cell[0]])

    def free_cells(self) -> list[Cell]:
        """Return all free cells."""
        return [(int(i), int(j)) for i, j in np.argwhere(self._free)]

    def _distances(self, goal: Cell) -> dict[Cell, int]:
        """Return the number of cells to `goal` from every cell that can reach it."""
        steps = {goal: 0}
        queue = deque([goal])
        while queue:
            cell = queue.popleft()
            for near in self._neighbours(cell):
                if near not in steps:
                    steps[near] = steps[cell] + 1
                    queue.append(near)
        return steps

    def _neighbours(self, cell: Cell) -> list[Cell]:
        i, j = cell
        near = [(i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)]
        rows, columns = self._free.shape
        return [(a, b) for a, b in near if 0 <= a < rows and 0 <= b < columns and self._free[a, b]]

    def waypoint(self, xy: np.ndarray, goal_xy: np.ndarray) -> np.ndarray:
        """Return the point to head for from `xy`: the centre of the next cell on a shortest way, or the goal itself.

        Inside a cell whose next neighbour is not straight ahead, corners are kept by heading for the cell's own centre
        until the point is within a quarter of a cell of the line to the next one.
        """
        here, goal = self.cell(xy), self.cell(goal_xy)
        steps = self.distances(goal)
        if here == goal or here not in steps:
            return np.asarray(goal_xy, dtype=np.float64)
        ahead = min(self._neighbours(here), key=lambda cell: steps.get(cell, np.inf))
        target = np.asarray(goal_xy, dtype=np.float64) if ahead == goal else self.centre(ahead)
        centre = self.centre(here)
        along = 1 if ahead[1] == here[1] else 0  # the axis of the next move
        aside = abs(float(xy[1 - along] - centre[1 - along]))
        return centre if aside > self._unit / 4 else target


class PointMazeExpert:
    """Breadth-first search and a proportional-derivative controller for gymnasium-robotics' ball: 10 (w - p) - v."""

    def __init__(self, cells: Sequence[Sequence[object]]) -> None:
        # The map is centred on the plane's origin, with cells of side 1.
        self._maze = Maze(cells, 1.0, (-(len(cells[0]) - 1) / 2, (len(cells) - 1) / 2), down=True)

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: Observation) -> None:
        """Begin new episodes: there is nothing to remember."""

    def act(self, obs: Observation, rows: Sequence[int]) -> np.ndarray:
        """Return the forces, clipped to [-1, 1]."""
        state = obs["observation.state"].astype(np.float64)
        targets = [self._maze.waypoint(s[:2], g) for s, g in zip(state, obs["observation.goal"], strict=True)]
        return np.clip(10 * (np.stack(targets) - state[:, :2]) - state[:, 2:4], -1, 1).astype(np.float32)
