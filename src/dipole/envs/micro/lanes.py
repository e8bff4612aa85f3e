"""Lanes: plan four seconds of driving; several manoeuvres are right at once.

The ego car stands at the origin and drives along x at a speed it is told. There is a lane at y = 0 and perhaps one at
+-3.5 m; a car drives ahead in the ego lane or not, and a box blocks one of the lanes. The scene is a bird's-eye view of
32 x 32 cells: channel 0 the lanes, 1 everything that blocks. Step k answers with the waypoint (x, y) in metres for 0.5
(k + 1) s; after eight the episode ends. Success: no waypoint or way between two hits anything, all stay on the lanes,
and the last is within 1 m of a lane's middle. The demonstrator picks one of the legal manoeuvres (keep, brake, left,
right) at random, at the ego's speed times a log-normal factor.
"""

from __future__ import annotations

import itertools

import numpy as np

from dipole.data import Feature
from dipole.envs.micro.canvas import BLUE, GREY, RED, WHITE, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State
from dipole.envs.spec import EnvSpec, Observation

NAME = "micro/lanes"
TASK = "Drive on without hitting anything."
MANOEUVRES = ("keep", "brake", "left", "right")
LANE = 3.5  # width and distance of lanes, m
WAYPOINTS, DT = 8, 0.5
CAR = np.array([2.3, 1.0])  # half length and half width, m
EGO = np.array([2.0, 0.9])
NONE = 1e3  # where an obstacle stands that is not there
CELLS = 32
# The view's near left corner and its cells: 2 m along x, 0.75 m along y.
VIEW_LOW = np.array([-4.0, -12.0])
VIEW_CELL = np.array([2.0, 0.75])
_TIMES = DT * np.arange(1, WAYPOINTS + 1)
_CHANGE_SECONDS = 3.0  # of a lane change
SPEED_SPREAD = 0.05  # of the logarithm of the demonstrators' speed
_STOP_GAP = 4.0  # m kept to what the ego brakes for


def rasterise(lanes: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """Return the view, float32 `[32, 32, 2]` (x cells, y cells), for lanes `[3]` bool and obstacle centres `[2, 2]`."""
    x = VIEW_LOW[0] + VIEW_CELL[0] * (np.arange(CELLS) + 0.5)
    y = VIEW_LOW[1] + VIEW_CELL[1] * (np.arange(CELLS) + 0.5)
    view = np.zeros((CELLS, CELLS, 2), dtype=np.float32)
    for lane, there in zip((-LANE, 0.0, LANE), lanes, strict=True):
        if there:
            view[:, np.abs(y - lane) <= LANE / 2, 0] = 1
    for centre in obstacles:
        # A cell counts as soon as the obstacle touches it.
        near = CAR + VIEW_CELL / 2
        view[np.ix_(np.abs(x - centre[0]) < near[0], np.abs(y - centre[1]) < near[1], [1])] = 1
    return view


def manoeuvre(kind: int, speed: float, obstacles: np.ndarray) -> np.ndarray:
    """Return the waypoints `[8, 2]` of manoeuvre `kind` (its place in `MANOEUVRES`) at `speed` m/s."""
    x, y = speed * _TIMES, np.zeros(WAYPOINTS)
    if kind == 1:
        ahead = obstacles[(np.abs(obstacles[:, 1]) < LANE / 2) & (obstacles[:, 0] < NONE), 0]
        room = (ahead.min() if len(ahead) else NONE) - CAR[0] - EGO[0] - _STOP_GAP
        # Come to rest within the room ahead, or within the four seconds when there is more of it than needed.
        stop = max(min(room, speed * _TIMES[-1] / 2), 0.1)
        brake = speed**2 / (2 * stop)
        t = np.minimum(_TIMES, speed / brake)
        x = speed * t - brake * t**2 / 2
    elif kind >= 2:
        s = np.clip(_TIMES / _CHANGE_SECONDS, 0, 1)
        y = (LANE if kind == 2 else -LANE) * (10 * s**3 - 15 * s**4 + 6 * s**5)
    return np.stack([x, y], axis=-1)


def hits(path: np.ndarray, obstacles: np.ndarray, parts: int = 8) -> np.ndarray:
    """Return `[n]`: whether the ego on its way along `path` `[n, K, 2]` touches one of `obstacles` `[n, M, 2]`.

    The way from each point to the next is checked at `parts` places; boxes are taken along the axes.
    """
    share = (np.arange(parts) + 1) / parts
    between = path[:, :-1, None] + share[:, None] * (path[:, 1:] - path[:, :-1])[:, :, None]
    points = between.reshape(len(path), -1, 2)
    gap = np.abs(points[:, :, None] - obstacles[:, None]) - (CAR + EGO)
    found: np.ndarray = (gap < 0).all(-1).any((1, 2))
    return found


def off_road(path: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Return `[n]`: whether a point of `path` `[n, K, 2]` lies outside every lane of `lanes` `[n, 3]`."""
    inside = np.abs(path[:, :, None, 1] - np.array([-LANE, 0, LANE])) <= LANE / 2
    found: np.ndarray = ~(inside & lanes[:, None]).any(-1).all(-1)
    return found


def legal_paths(lanes: np.ndarray, obstacles: np.ndarray, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """Return all manoeuvres `[4, 8, 2]` of a scene and which of them are legal `[4]`."""
    paths = np.stack([manoeuvre(kind, speed, obstacles) for kind in range(4)])
    full = np.concatenate([np.zeros((4, 1, 2)), paths], axis=1)
    legal = ~hits(full, np.broadcast_to(obstacles, (4, 2, 2))) & ~off_road(full, np.broadcast_to(lanes, (4, 3)))
    return paths, legal


class Lanes:
    """The task. Info: `hit`, `off_road`."""

    def __init__(self) -> None:
        self.spec = EnvSpec(
            name=NAME,
            observation={
                "observation.state": Feature("float32", (4,), ("x", "y", "speed", "time")),
                "observation.scene": Feature("float32", (CELLS, CELLS, 2), ("x", "y", "channel")),
            },
            action=Feature("float32", (2,), ("x", "y")),
            action_low=np.array([-1.2, -20.0], dtype=np.float32),
            action_high=np.array([70.0, 20.0], dtype=np.float32),
            max_steps=WAYPOINTS,
            fps=1 / DT,
            task=TASK,
        )

    def begin(self, rng: np.random.Generator) -> State:
        """Draw scenes until at least one manoeuvre is legal."""
        while True:
            speed = float(np.clip(rng.lognormal(np.log(9.0), 0.2), 5, 14))
            lanes = np.array([rng.uniform() < 0.7, True, rng.uniform() < 0.7])
            lead = np.array([rng.uniform(12, 55) if rng.uniform() < 0.7 else NONE, 0.0])
            box = np.array([rng.uniform(12, 50), rng.choice((-LANE, 0.0, LANE)[1 - lanes[0] : 2 + lanes[2]])])
            obstacles = np.stack([lead, box])
            if legal_paths(lanes, obstacles, speed)[1].any():
                break
        return {
            "path": np.zeros((WAYPOINTS + 1, 2)),
            "speed": np.array(speed),
            "lanes": lanes,
            "obstacles": obstacles,
            "scene": rasterise(lanes, obstacles),
        }

    def observe(self, state: State) -> Observation:
        """Return position, speed and time `[n, 4]`, and the view `[n, 32, 32, 2]`."""
        clock = state["clock"]
        place = state["path"][np.arange(len(clock)), np.minimum(clock, WAYPOINTS)]
        now = np.concatenate([place, state["speed"][:, None], DT * clock[:, None]], axis=-1)
        return {"observation.state": now.astype(np.float32), "observation.scene": state["scene"]}

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Take down the next waypoint; the way to it is checked at once."""
        rows, clock = np.arange(len(action)), state["clock"]
        path = state["path"].copy()
        path[rows, clock + 1] = action
        leg = path[rows[:, None], clock[:, None] + np.array([0, 1])]
        hit, off = hits(leg, state["obstacles"]), off_road(leg, state["lanes"])
        last = clock + 1 >= WAYPOINTS
        middle = np.where(state["lanes"], np.abs(action[:, 1:] - np.array([-LANE, 0, LANE])), np.inf).min(-1) < 1.0
        success = last & middle & ~hit & ~off
        return Outcome(
            state | {"path": path}, success.astype(float), last | hit | off, success, {"hit": hit, "off_road": off}
        )

    def draw(self, state: State) -> np.ndarray:
        """Draw lanes, obstacles and the waypoints so far, driving to the right."""
        canvas = Canvas((-5.0, -30.0), (55.0, 30.0))
        for lane, there in zip((-LANE, 0.0, LANE), state["lanes"], strict=True):
            if there:
                canvas.box((-5, lane - LANE / 2), (55, lane + LANE / 2), GREY)
        for lane in (-LANE / 2, LANE / 2):
            canvas.line((-5, lane), (55, lane), 0.2, WHITE)
        for centre in state["obstacles"]:
            canvas.box(centre - CAR, centre + CAR, RED)
        points = state["path"][: int(state["clock"]) + 1]
        canvas.box(points[-1] - EGO, points[-1] + EGO, BLUE)
        for a, b in itertools.pairwise(points):
            canvas.line(a, b, 0.5, BLUE)
        return canvas.image()


class LanesExpert:
    """Carries out one of the legal manoeuvres."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Choose manoeuvre and speed and lay the waypoints `[8, 2]`."""
        speed = float(state["speed"])
        while True:
            factor = float(rng.lognormal(0, SPEED_SPREAD))
            paths, legal = legal_paths(state["lanes"], state["obstacles"], speed * factor)
            if legal.any():
                return {"path": paths[rng.choice(np.flatnonzero(legal))]}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the next waypoint."""
        clock = np.minimum(state["clock"], WAYPOINTS - 1)
        return memory["path"][np.arange(len(clock)), clock], memory
