"""Track2D: follow a goal that jumps once. Measures how fast a policy reacts.

As Fork2D without the disc: p += clip(a - p, -0.12, 0.12), from (U(-0.1, 0.1), -1) to the goal (0, 1), which is
observed. At a random tick the goal's x jumps by U(-0.5, 0.5). The return of an episode is minus the mean distance to
the current goal over the ten steps that follow the jump.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.experts.paths import ornstein_uhlenbeck
from dipole.envs.micro.canvas import BLUE, GREEN, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/track2d"
TASK = "Go to the goal, which jumps sideways once."
REACH = 0.12
NEAR = 0.1
JUMP_TICKS = (8, 25)  # first and one past the last tick at which the goal can jump
WINDOW = 10  # steps after the jump that are scored
MAX_STEPS = 45
DURATION = 30  # steps of a demonstration without a jump
REPLAN = 12  # least steps of the path laid after the jump


def goal_now(state: State) -> np.ndarray:
    """Return the current goal `[..., 2]`."""
    x = np.where(state["clock"] >= state["tick"], state["jump"], 0.0)
    return np.stack([x, np.ones_like(x)], axis=-1)


class Track2D:
    """The task. Info: `distance` to the current goal and `scored` (the step is one of the ten after the jump)."""

    def __init__(self) -> None:
        observation = {"observation.state": ("x", "y"), "observation.environment_state": ("goal_x", "goal_y")}
        self.spec = micro_spec(NAME, observation, ("target_x", "target_y"), 1.5, MAX_STEPS, TASK, score="return")

    def begin(self, rng: np.random.Generator) -> State:
        """Draw start, jump and its tick."""
        return {
            "p": np.array([rng.uniform(-0.1, 0.1), -1.0]),
            "jump": np.array(rng.uniform(-0.5, 0.5)),
            "tick": np.array(rng.integers(*JUMP_TICKS)),
        }

    def observe(self, state: State) -> Observation:
        """Return position and current goal, `[n, 2]` each."""
        return {
            "observation.state": state["p"].astype(np.float32),
            "observation.environment_state": goal_now(state).astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move towards the target; the goal of the step is the one that was observed before it."""
        p = state["p"] + np.clip(action - state["p"], -REACH, REACH)
        distance = np.linalg.norm(p - goal_now(state), axis=-1)
        since = state["clock"] - state["tick"]
        scored = (since >= 0) & (since < WINDOW)
        reward = np.where(scored, -distance / WINDOW, 0.0)
        never = np.zeros(len(p), dtype=bool)
        success = (distance < NEAR) & (since >= 0)
        return Outcome(state | {"p": p}, reward, never, success, {"distance": distance, "scored": scored})

    def draw(self, state: State) -> np.ndarray:
        """Draw goal and point."""
        canvas = Canvas((-1.2, -1.2), (1.2, 1.2))
        canvas.ring(goal_now(state), NEAR, 0.03, GREEN)
        canvas.disc(state["p"], 0.05, BLUE)
        return canvas.image()


class Track2DExpert:
    """Minimum-jerk motion to the goal, laid anew from where the point is as soon as the goal jumps."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Lay the first path and draw the noise."""
        return {
            "origin": state["p"],
            "goal": np.array([0.0, 1.0]),
            "start": np.array(0),
            "duration": np.array(DURATION),
            "noise": ornstein_uhlenbeck(rng, MAX_STEPS, 2, std=0.01),
        }

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the next point of the current path."""
        p, goal, clock = state["p"], goal_now(state), state["clock"]
        jumped = (goal != memory["goal"]).any(-1)
        left = np.maximum(memory["start"] + memory["duration"] - clock, REPLAN)
        memory = memory | {
            "origin": np.where(jumped[:, None], p, memory["origin"]),
            "goal": goal,
            "duration": np.where(jumped, left, memory["duration"]),
            "start": np.where(jumped, clock, memory["start"]),
        }
        s = np.clip((clock + 1 - memory["start"]) / memory["duration"], 0, 1)[:, None]
        blend = 10 * s**3 - 15 * s**4 + 6 * s**5
        noise = memory["noise"][np.arange(len(p)), np.minimum(clock, MAX_STEPS - 1)]
        return memory["origin"] + blend * (goal - memory["origin"]) + noise, memory
