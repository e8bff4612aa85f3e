"""SlotPeg: hit a narrow slot in spite of drift. The value of closing the loop is known before any training.

A peg advances by itself and crosses y = 0 in step 32. The action shifts x by dx; then noise of 0.01 is added to x.
Success: |x - slot| < 0.02 at the crossing. A plan of 16 steps executed without looking drifts by 0.01 sqrt(16) = 0.04
and succeeds with P(|z| < 0.5) = 0.383; looking before every step leaves the noise of one, P(|z| < 2) = 0.954. The
crossing falls on the last step of the second plan. The demonstrator plans 16 steps at a time.
"""

from __future__ import annotations

import math

import numpy as np

from dipole.envs.micro.canvas import BLACK, BLUE, GREY, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/slot_peg"
TASK = "Put the peg through the slot."
CHUNK = 16
STEPS = 32  # the crossing is in the last
NOISE = 0.01
HALF_WIDTH = 0.02
ADVANCE = 1 / 32
REACH = 0.1  # largest shift of a step


def ceiling(chunk: int) -> float:
    """Return the success probability of the best policy that looks every `chunk` steps (a divisor of 32)."""
    return math.erf(HALF_WIDTH / (NOISE * math.sqrt(chunk)) / math.sqrt(2))


class SlotPeg:
    """The task. Info: `miss`, x minus the slot."""

    def __init__(self) -> None:
        observation = {"observation.state": ("x", "y"), "observation.environment_state": ("slot",)}
        self.spec = micro_spec(NAME, observation, ("dx",), REACH, STEPS, TASK)

    def begin(self, rng: np.random.Generator) -> State:
        """Draw start, slot and the noise of every step."""
        return {
            "x": np.array(rng.normal(0, 0.1)),
            "slot": np.array(rng.uniform(-0.3, 0.3)),
            "noise": rng.normal(0, NOISE, STEPS),
        }

    @staticmethod
    def _y(state: State) -> np.ndarray:
        # Half a step short of a whole number, so that rounding cannot move the crossing to another step.
        return (state["clock"] - STEPS + 0.5) * ADVANCE

    def observe(self, state: State) -> Observation:
        """Return x and y `[n, 2]`, and the slot `[n, 1]`."""
        return {
            "observation.state": np.stack([state["x"], self._y(state)], axis=-1).astype(np.float32),
            "observation.environment_state": state["slot"][:, None].astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Shift, drift, advance; the episode ends at the crossing."""
        clock = state["clock"]
        noise = state["noise"][np.arange(len(clock)), np.minimum(clock, STEPS - 1)]
        x = state["x"] + action[:, 0] + noise
        crosses = clock + 1 >= STEPS
        miss = x - state["slot"]
        success = crosses & (np.abs(miss) < HALF_WIDTH)
        return Outcome(state | {"x": x}, success.astype(float), crosses, success, {"miss": miss})

    def draw(self, state: State) -> np.ndarray:
        """Draw wall, slot and peg."""
        canvas = Canvas((-0.6, -1.1), (0.6, 0.1))
        slot = float(state["slot"])
        canvas.box((-0.6, 0), (slot - HALF_WIDTH, 0.03), GREY)
        canvas.box((slot + HALF_WIDTH, 0), (0.6, 0.03), GREY)
        canvas.line((0, -1.05), (0, -1.05), 0.02, BLACK)
        canvas.disc((state["x"], self._y(state)), 0.02, BLUE)
        return canvas.image()


class SlotPegExpert:
    """Plans `chunk` even shifts to the slot and carries them out without looking; then plans again."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Start without a plan."""
        return {"shift": np.array(0.0)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return dx of the current plan."""
        gap = state["slot"] - state["x"]
        shift = np.where(state["clock"] % self.chunk == 0, gap / self.chunk, memory["shift"])
        return np.clip(shift, -REACH, REACH)[:, None], memory | {"shift": shift}
