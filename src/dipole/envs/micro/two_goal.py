"""TwoGoal: demonstrations mostly lead to the left goal, only the right one is rewarded.

A point with velocity actions, dt = 0.1, starts at N(0, 0.05^2) and has 32 steps to reach one of the goals (-1, 0) and
(1, 0); reaching either ends the episode, only the right one counts. Demonstrators go left with probability 0.8, right
with 0.2: a proportional controller with noise of 0.1 in the action. A faithful imitation succeeds about 0.20 by
construction, though the way to 1 lies within what it can produce.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.micro.canvas import BLUE, GREEN, RED, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/two_goal"
TASK = "Go to the right goal."
RIGHT = np.array([1.0, 0.0])
DT = 0.1
NEAR = 0.1
MAX_STEPS = 32
LEFT_SHARE = 0.8
GAIN = 2.0
TOP_SPEED = 1.0  # of the demonstrators
NOISE = 0.1


class TwoGoal:
    """The task. Info: `side`, -1 at the left goal, +1 at the right one, else 0."""

    def __init__(self) -> None:
        self.spec = micro_spec(NAME, {"observation.state": ("x", "y")}, ("vx", "vy"), 1.5, MAX_STEPS, TASK)

    def begin(self, rng: np.random.Generator) -> State:
        """Draw the start."""
        return {"p": rng.normal(0, 0.05, 2)}

    def observe(self, state: State) -> Observation:
        """Return the point's position `[n, 2]`."""
        return {"observation.state": state["p"].astype(np.float32)}

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move for 0.1 s."""
        p = state["p"] + DT * action
        right = np.linalg.norm(p - RIGHT, axis=-1) < NEAR
        left = np.linalg.norm(p + RIGHT, axis=-1) < NEAR
        side = right.astype(float) - left.astype(float)
        return Outcome(state | {"p": p}, right.astype(float), right | left, right, {"side": side})

    def draw(self, state: State) -> np.ndarray:
        """Draw both goals and the point."""
        canvas = Canvas((-1.3, -1.3), (1.3, 1.3))
        canvas.ring(RIGHT, NEAR, 0.03, GREEN)
        canvas.ring(-RIGHT, NEAR, 0.03, RED)
        canvas.disc(state["p"], 0.05, BLUE)
        return canvas.image()


class TwoGoalExpert:
    """Proportional controller to the goal that the episode's seed chose, with noise in the action."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Choose the goal and draw the noise."""
        side = -1.0 if rng.uniform() < LEFT_SHARE else 1.0
        return {"goal": side * RIGHT, "noise": rng.normal(0, NOISE, (MAX_STEPS, 2))}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the velocity, at most 1 before the noise."""
        velocity = GAIN * (memory["goal"] - state["p"])
        speed = np.linalg.norm(velocity, axis=-1, keepdims=True)
        velocity *= np.minimum(1, TOP_SPEED / np.maximum(speed, 1e-9))
        clock = np.minimum(state["clock"], MAX_STEPS - 1)
        return velocity + memory["noise"][np.arange(len(clock)), clock], memory
