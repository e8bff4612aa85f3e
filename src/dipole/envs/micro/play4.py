"""Play4: four pads, demonstrations that play about, and a goal that is a future state.

A point (p += clip(a - p, -0.12, 0.12)) lights the pads it visits; pads stand at (+-0.7, +-0.7). The state is the
position and which pads are lit. An episode asks for two pads: its goal is a state with just these lit and the point on
one of them. It ends after as many visits as pads were asked for, so info `result` (asked pads visited) and `reward`
(any pads visited) tell a policy that follows its goal from one that just plays. Demonstrations play: all four pads in
random order, whatever is asked; take goals from future states of the episode.
"""

from __future__ import annotations

import itertools

import numpy as np

from dipole.envs.experts.paths import min_jerk, ornstein_uhlenbeck
from dipole.envs.micro.canvas import BLUE, GREEN, GREY, ORANGE, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/play4"
TASK = "Visit the pads of the goal state."
PADS = np.array([(-0.7, -0.7), (0.7, -0.7), (-0.7, 0.7), (0.7, 0.7)])
REACH = 0.12
NEAR = 0.12
ASKED = 2
MAX_STEPS = 100
LEG = 18  # steps from pad to pad

_LIT = tuple(f"lit_{k}" for k in range(4))


class Play4:
    """The task. Info: `result` and `reward`, asked pads and any pads visited so far.

    Args:
        play: Do not end after the asked number of visits (for demonstrations).
    """

    def __init__(self, play: bool = False) -> None:
        self._play = play
        observation = {"observation.state": ("x", "y", *_LIT), "observation.goal": ("x", "y", *_LIT)}
        self.spec = micro_spec(NAME, observation, ("target_x", "target_y"), 1.5, MAX_STEPS, TASK, score="return")

    def begin(self, rng: np.random.Generator) -> State:
        """Draw the start near the middle and the asked pads; the point shall be on the second of them."""
        asked = rng.permutation(4)[:ASKED]
        goal = np.zeros(6)
        goal[:2] = PADS[asked[-1]]
        goal[2 + asked] = 1
        return {"p": rng.uniform(-0.1, 0.1, 2), "lit": np.zeros(4, dtype=bool), "goal": goal}

    def observe(self, state: State) -> Observation:
        """Return state and goal, `[n, 6]` each."""
        return {
            "observation.state": np.concatenate([state["p"], state["lit"]], axis=-1).astype(np.float32),
            "observation.goal": state["goal"].astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move and light; the reward counts asked pads lit in this step, as a share of all asked."""
        p = state["p"] + np.clip(action - state["p"], -REACH, REACH)
        there = np.linalg.norm(p[:, None] - PADS, axis=-1) < NEAR
        lit = state["lit"] | there
        asked = state["goal"][:, 2:] > 0.5
        gained = (lit & ~state["lit"] & asked).sum(-1)
        result, visits = (lit & asked).sum(-1), lit.sum(-1)
        over = visits >= (4 if self._play else ASKED)
        info = {"result": result, "reward": visits}
        return Outcome(state | {"p": p, "lit": lit}, gained / ASKED, over, result == ASKED, info)

    def draw(self, state: State) -> np.ndarray:
        """Draw pads (green: asked and lit, orange: lit, ringed: asked) and the point."""
        canvas = Canvas((-1.1, -1.1), (1.1, 1.1))
        for pad, lit, asked in zip(PADS, state["lit"], state["goal"][2:] > 0.5, strict=True):
            canvas.disc(pad, NEAR, (GREEN if asked else ORANGE) if lit else GREY)
            if asked:
                canvas.ring(pad, NEAR + 0.05, 0.03, GREEN)
        canvas.disc(state["p"], 0.05, BLUE)
        return canvas.image()


class Play4Expert:
    """Visits the four pads in random order on minimum-jerk paths."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Lay the whole path `[MAX_STEPS, 2]`."""
        stops = [state["p"], *PADS[rng.permutation(4)]]
        legs = [min_jerk(a, b, LEG)[1:] for a, b in itertools.pairwise(stops)]
        path = np.concatenate([*legs, np.repeat(stops[-1][None], MAX_STEPS - 4 * LEG, axis=0)])
        return {"path": path + ornstein_uhlenbeck(rng, MAX_STEPS, 2, std=0.02)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the next point of the path."""
        clock = np.minimum(state["clock"], MAX_STEPS - 1)
        return memory["path"][np.arange(len(clock)), clock], memory
