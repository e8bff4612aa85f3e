"""Wipe: press a tool on an uneven surface that shifts. Seeing is slow and late; feeling the force is quick.

A tool at (x, z) touches a surface h(x) + delta with force f = 50 max(0, h(x) + delta - z). The action moves it by (dx,
dz). It shall sweep from x = 0 to 1 in 128 ticks at 24 Hz with f in [0.5, 1.5]. Every 16 ticks, 4 ticks late, x, z and
h(x) + N(0, 0.03) are seen; f is felt at every tick. At a random tick delta, unseen, jumps from 0 to +-0.1. The return
of an episode is the share of ticks in the band; info tells before and after the jump apart.
"""

from __future__ import annotations

import numpy as np

from dipole.envs.micro.canvas import BLUE, GREEN, GREY, RED, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/wipe"
TASK = "Sweep along the surface with an even force."
STIFFNESS = 50.0
BAND = (0.5, 1.5)
TARGET = 1.0  # middle of the band
TICKS = 128
SLOW_EVERY, SLOW_LATE = 16, 4
SEEN_STD = 0.03
JUMP_TICKS = (30, 98)
JUMP = 0.1
BOUND = (0.02, 0.03)  # largest dx and dz of a tick


def surface(x: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """Return h(x) of two sine waves; `waves` `[..., 2, 2]` holds amplitude and phase of each."""
    amplitude, phase = waves[..., 0], waves[..., 1]
    frequency = 2 * np.pi * np.array([1.0, 2.0])
    height: np.ndarray = (amplitude * np.sin(frequency * np.asarray(x)[..., None] + phase)).sum(-1)
    return height


def force_now(state: State) -> np.ndarray:
    """Return the force `[...]`."""
    delta = np.where(state["clock"] >= state["tick"], state["jump"], 0.0)
    force: np.ndarray = STIFFNESS * np.maximum(0, surface(state["x"], state["waves"]) + delta - state["z"])
    return force


class Wipe:
    """The task. Info: `force`, `in_band`, `after_jump`."""

    def __init__(self) -> None:
        observation = {"observation.state": ("seen_x", "seen_z", "seen_h"), "observation.force": ("force",)}
        self.spec = micro_spec(NAME, observation, ("dx", "dz"), BOUND, TICKS, TASK, fps=24.0, score="return")

    def begin(self, rng: np.random.Generator) -> State:
        """Draw surface, jump and what is misread of the surface; the tool starts pressed on with force 1."""
        amplitude = rng.uniform([0.03, 0.01], [0.05, 0.02])
        waves = np.stack([amplitude, rng.uniform(0, 2 * np.pi, 2)], axis=-1)
        height = surface(np.array(0.0), waves)
        z = height - TARGET / STIFFNESS
        misread = rng.normal(0, SEEN_STD, TICKS // SLOW_EVERY + 1)
        first = np.array([0.0, z, height + misread[0]])
        return {
            "x": np.array(0.0),
            "z": np.array(z),
            "waves": waves,
            "misread": misread,
            "tick": np.array(rng.integers(*JUMP_TICKS)),
            "jump": np.array(JUMP * rng.choice([-1.0, 1.0])),
            "seen": first,
            "pending": first,
        }

    def observe(self, state: State) -> Observation:
        """Return what was last seen `[n, 3]` and the force now `[n, 1]`."""
        return {
            "observation.state": state["seen"].astype(np.float32),
            "observation.force": force_now(state)[:, None].astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move the tool; a look taken at a multiple of 16 ticks is delivered 4 ticks later."""
        clock = state["clock"] + 1
        after = state | {"x": np.clip(state["x"] + action[:, 0], 0, 1), "z": state["z"] + action[:, 1]}
        looks = clock % SLOW_EVERY == 0
        misread = after["misread"][np.arange(len(clock)), np.minimum(clock // SLOW_EVERY, TICKS // SLOW_EVERY)]
        look = np.stack([after["x"], after["z"], surface(after["x"], after["waves"]) + misread], axis=-1)
        after["pending"] = np.where(looks[:, None], look, state["pending"])
        delivered = clock % SLOW_EVERY == SLOW_LATE
        after["seen"] = np.where(delivered[:, None], after["pending"], state["seen"])
        force = force_now(after | {"clock": clock})
        in_band = (force >= BAND[0]) & (force <= BAND[1])
        success = (clock >= TICKS) & (after["x"] > 0.95) & in_band
        info = {"force": force, "in_band": in_band, "after_jump": clock >= state["tick"]}
        return Outcome(after, in_band / TICKS, np.zeros(len(clock), dtype=bool), success, info)

    def draw(self, state: State) -> np.ndarray:
        """Draw the surface from the side, and the tool: green in the band, red when too hard, blue when too light."""
        canvas = Canvas((-0.1, -0.6), (1.1, 0.6))
        delta = float(state["jump"]) if state["clock"] >= state["tick"] else 0.0
        grid = np.linspace(0, 1, 60)
        heights = surface(grid, np.broadcast_to(state["waves"], (60, 2, 2))) + delta
        for k in range(59):
            canvas.line((grid[k], heights[k]), (grid[k + 1], heights[k + 1]), 0.015, GREY)
        force = float(force_now(state))
        colour = RED if force > BAND[1] else BLUE if force < BAND[0] else GREEN
        canvas.line((state["x"], state["z"]), (state["x"], state["z"] + 0.25), 0.03, colour)
        return canvas.image()


class WipeExpert:
    """Even speed along x and a PI controller on the force: moving by dz makes the proportional part an integral one."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Start with no accumulated error."""
        return {"sum": np.array(0.0)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return (dx, dz). The error is capped, as a force far from the target says little about how far."""
        error = np.clip(force_now(state) - TARGET, -1.0, 4.0)
        total = np.clip(memory["sum"] + error, -3, 3)
        dz = np.clip((0.6 * error + 0.12 * total) / STIFFNESS, -BOUND[1], BOUND[1])
        return np.stack([np.full_like(dz, 1 / TICKS), dz], axis=-1), memory | {"sum": total}
