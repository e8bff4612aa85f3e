"""Pendulum: swing a pole up and hold it, with a torque too weak to lift it at once.

Rules and numbers are those of Gymnasium's `Pendulum-v1`: the return is minus the sum of squared angle, speed and torque
over 200 steps; doing nothing costs about 1200, holding the pole up from a good start about 150. The demonstrator is a
weak controller: it pulls the pole towards upright in proportion to angle and speed, and so never gathers the swing.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.micro.canvas import BLACK, BLUE, GREY, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/pendulum"
TASK = "Swing the pole up and hold it."
DT = 0.05
TORQUE = 2.0
TOP_SPEED = 8.0
MAX_STEPS = 200
ANGLE_GAIN, SPEED_GAIN = 1.0, 0.2  # of the demonstrator
NOISE = 0.3  # in the demonstrator's torque


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Return angles from upright in [-pi, pi)."""
    return np.mod(angle + np.pi, 2 * np.pi) - np.pi


class Pendulum:
    """The task. Info: `angle` from upright before the step. There is no success: episodes are judged by return."""

    def __init__(self) -> None:
        parts = {"observation.state": ("cos", "sin", "speed")}
        self.spec = micro_spec(NAME, parts, ("torque",), TORQUE, MAX_STEPS, TASK, fps=1 / DT, score="return")

    def begin(self, rng: np.random.Generator) -> State:
        """Draw an angle anywhere and a small speed."""
        return {"angle": np.asarray(rng.uniform(-np.pi, np.pi)), "speed": np.asarray(rng.uniform(-1, 1))}

    def observe(self, state: State) -> Observation:
        """Return cosine and sine of the angle, and the angular speed `[n, 3]`."""
        angle, speed = state["angle"], state["speed"]
        return {"observation.state": np.stack([np.cos(angle), np.sin(angle), speed], axis=-1).astype(np.float32)}

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Apply the torque for 0.05 s."""
        angle, speed, torque = wrapped(state["angle"]), state["speed"], action[:, 0]
        reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
        faster = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * DT, -TOP_SPEED, TOP_SPEED)
        never = np.zeros(len(angle), dtype=bool)
        after = state | {"angle": state["angle"] + faster * DT, "speed": faster}
        return Outcome(after, reward, never, never, {"angle": angle})

    def draw(self, state: State) -> np.ndarray:
        """Draw the pole and its pivot."""
        canvas = Canvas((-1.3, -1.3), (1.3, 1.3))
        angle = float(state["angle"])
        canvas.ring((0, 0), 1.0, 0.01, GREY)
        canvas.line((0, 0), (-np.sin(angle), np.cos(angle)), 0.15, BLUE)
        canvas.disc((0, 0), 0.05, BLACK)
        return canvas.image()


class PendulumExpert:
    """A weak proportional controller of angle and speed, with noise in the torque."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Draw the noise."""
        return {"noise": rng.normal(0, NOISE, MAX_STEPS)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the torque."""
        clock = np.minimum(state["clock"], MAX_STEPS - 1)
        torque = -ANGLE_GAIN * wrapped(state["angle"]) - SPEED_GAIN * state["speed"]
        return np.clip(torque + memory["noise"][np.arange(len(clock)), clock], -TORQUE, TORQUE)[:, None], memory
