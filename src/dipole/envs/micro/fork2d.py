"""Fork2D: go round a disc, left or right. The smallest task on which averaging two good answers is a crash.

A point p in the plane starts at (U(-0.1, 0.1), -1). The action is a position target: p += clip(a - p, -0.12, 0.12).
The goal is (0, 1), a disc of radius 0.3 stands at the origin. Success: within 0.1 of the goal in 60 steps without ever
touching the disc; touching it ends the episode. Demonstrators take either side with probability 1/2, on a minimum-jerk
path through (0.55 s, 0), s = +-1, with Ornstein-Uhlenbeck noise of 0.01.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.experts.paths import min_jerk_via, ornstein_uhlenbeck
from dipole.envs.micro.canvas import BLUE, GREEN, RED, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/fork2d"
TASK = "Go to the goal round the disc."
GOAL = np.array([0.0, 1.0])
REACH = 0.12  # per axis and step
RADIUS = 0.3
NEAR = 0.1
VIA = 0.55
DURATION = 30  # steps of a demonstration
MAX_STEPS = 60


def segment_distance(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Return the distance `[n]` from `point` to the segments between `start` and `end` `[n, 2]`."""
    along = end - start
    square = np.maximum((along**2).sum(-1), 1e-12)  # a segment of no length is its start
    share = np.clip(((point - start) * along).sum(-1) / square, 0, 1)
    found: np.ndarray = np.linalg.norm(start + share[:, None] * along - point, axis=-1)
    return found


class Fork2D:
    """The task. Info: `side`, +1 or -1 while the point is level with the disc (on its right or left), else 0."""

    def __init__(self) -> None:
        self.spec = micro_spec(NAME, {"observation.state": ("x", "y")}, ("target_x", "target_y"), 1.5, MAX_STEPS, TASK)

    def begin(self, rng: np.random.Generator) -> State:
        """Draw the start."""
        return {"p": np.array([rng.uniform(-0.1, 0.1), -1.0])}

    def observe(self, state: State) -> Observation:
        """Return the point's position `[n, 2]`."""
        return {"observation.state": state["p"].astype(np.float32)}

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move towards the target; the whole way is checked against the disc, not only its end."""
        p = state["p"] + np.clip(action - state["p"], -REACH, REACH)
        crash = segment_distance(state["p"], p, np.zeros(2)) < RADIUS
        success = (np.linalg.norm(p - GOAL, axis=-1) < NEAR) & ~crash
        side = np.where(np.abs(p[:, 1]) < RADIUS, np.sign(p[:, 0]), 0.0)
        return Outcome(
            state | {"p": p}, success.astype(float), success | crash, success, {"side": side, "crash": crash}
        )

    def draw(self, state: State) -> np.ndarray:
        """Draw disc, goal and point."""
        canvas = Canvas((-1.2, -1.2), (1.2, 1.2))
        canvas.disc((0, 0), RADIUS, RED)
        canvas.ring(GOAL, NEAR, 0.03, GREEN)
        canvas.disc(state["p"], 0.05, BLUE)
        return canvas.image()


class Fork2DExpert:
    """Follows one of the two ways round, chosen by the episode's seed."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Choose a side and lay the path `[MAX_STEPS, 2]`, resting at the goal after `DURATION` steps."""
        side = rng.choice([-1.0, 1.0])
        path = min_jerk_via(state["p"], np.array([VIA * side, 0.0]), GOAL, DURATION)[1:]
        path = np.concatenate([path, np.repeat(GOAL[None], MAX_STEPS - DURATION, axis=0)])
        return {"path": path + ornstein_uhlenbeck(rng, MAX_STEPS, 2, std=0.01)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the next point of the path as the target."""
        clock = np.minimum(state["clock"], MAX_STEPS - 1)
        return memory["path"][np.arange(len(clock)), clock], memory
