"""Grip2D: fetch an object with a gripper that is either open or closed. The smallest task with a binary action.

The action is a position target and the gripper: p += clip(a - p, -0.12, 0.12), closed if the third number is positive.
Closing within 0.05 of the object takes it; it then moves along until the gripper opens. Closing elsewhere takes
nothing, and the gripper must open again first. Success: the object released within 0.1 of the bin.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.experts.paths import ornstein_uhlenbeck
from dipole.envs.micro.canvas import BLUE, GREEN, ORANGE, RED, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/grip2d"
TASK = "Pick up the object and drop it into the bin."
BIN = np.array([0.6, 0.8])
REACH = 0.12
TAKE = 0.05
NEAR = 0.1
MAX_STEPS = 80


class Grip2D:
    """The task. Info: `holding`."""

    def __init__(self) -> None:
        observation = {
            "observation.state": ("x", "y", "gripper"),
            "observation.environment_state": ("object_x", "object_y"),
        }
        action = ("target_x", "target_y", "gripper")
        self.spec = micro_spec(NAME, observation, action, (1.5, 1.5, 1.0), MAX_STEPS, TASK)

    def begin(self, rng: np.random.Generator) -> State:
        """Draw start and object; the gripper is open."""
        return {
            "p": np.array([rng.uniform(-0.1, 0.1), -1.0]),
            "object": np.array([rng.uniform(-0.7, 0.3), rng.uniform(-0.5, 0.3)]),
            "closed": np.array(False),
            "holding": np.array(False),
        }

    def observe(self, state: State) -> Observation:
        """Return position and gripper (-1 open, +1 closed) `[n, 3]`, and the object `[n, 2]`."""
        gripper = np.where(state["closed"], 1.0, -1.0)[:, None]
        return {
            "observation.state": np.concatenate([state["p"], gripper], axis=-1).astype(np.float32),
            "observation.environment_state": state["object"].astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move, then open or close."""
        p = state["p"] + np.clip(action[:, :2] - state["p"], -REACH, REACH)
        carried = np.where(state["holding"][:, None], p, state["object"])
        closed = action[:, 2] > 0
        takes = closed & ~state["closed"] & (np.linalg.norm(p - carried, axis=-1) < TAKE)
        released = state["holding"] & ~closed
        holding = closed & (state["holding"] | takes)
        success = released & (np.linalg.norm(carried - BIN, axis=-1) < NEAR)
        after = state | {"p": p, "object": carried, "closed": closed, "holding": holding}
        return Outcome(after, success.astype(float), success, success, {"holding": holding})

    def draw(self, state: State) -> np.ndarray:
        """Draw bin, object and gripper (orange when closed)."""
        canvas = Canvas((-1.2, -1.2), (1.2, 1.2))
        canvas.ring(BIN, NEAR, 0.03, GREEN)
        canvas.disc(state["object"], 0.06, RED)
        canvas.ring(state["p"], 0.08, 0.04, ORANGE if state["closed"] else BLUE)
        return canvas.image()


class Grip2DExpert:
    """Goes to the object, closes, goes to the bin, opens; slows down on the way in. Goes back if it lost the object."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Draw the noise of the motion."""
        return {"noise": ornstein_uhlenbeck(rng, MAX_STEPS, 2, std=0.01)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return target and gripper of the current phase, which is read off the state."""
        p, closed, holding = state["p"], state["closed"], state["holding"]
        goal = np.where(holding[:, None], BIN, state["object"])
        gap = np.linalg.norm(goal - p, axis=-1, keepdims=True)
        pace = np.minimum(0.1, 0.4 * gap + 0.01)
        noise = memory["noise"][np.arange(len(p)), np.minimum(state["clock"], MAX_STEPS - 1)]
        near = gap[:, 0] < 0.03
        target = p + (goal - p) * np.minimum(pace / np.maximum(gap, 1e-9), 1) + noise * np.minimum(1, 5 * gap)
        # Close only at the object and from open; after a missed grasp `closed` without `holding` opens again.
        grip = np.where(holding, ~near, near & ~closed)
        return np.concatenate([target, np.where(grip, 1.0, -1.0)[:, None]], axis=-1), memory
