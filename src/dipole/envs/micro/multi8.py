"""Multi8: eight reaching tasks told apart by language, seen through two stand-ins for cameras.

Four coloured discs lie about; a task names a colour and a side: touch the point 0.15 to the left or right of that disc.
The action is a position target, p += clip(a - p, -0.12, 0.12). The pictures of a static and a wrist camera are replaced
by 16 features each: fixed random projections of where the discs and the hand are, and of where the discs are as seen
from the hand. The sentence is replaced by a fixed random code of 16 numbers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dipole.envs.experts.paths import ornstein_uhlenbeck
from dipole.envs.micro.canvas import BLACK, BLUE, GREEN, ORANGE, RED, Canvas
from dipole.envs.micro.demonstrator import Memory
from dipole.envs.micro.task import Outcome, State, micro_spec
from dipole.envs.spec import Observation

NAME = "micro/multi8"
TASK = "Touch the place that the sentence names."
COLOURS = ("red", "green", "blue", "orange")
SIDES = ("left", "right")
SENTENCES = tuple(f"Touch the {side} of the {colour} disc." for colour in COLOURS for side in SIDES)
OFFSET = 0.15
REACH = 0.12
NEAR = 0.06
APART = 0.4  # least distance between two discs, and of the hand's start to each
MAX_STEPS = 40
WIDTH = 16  # features of a camera and of a sentence

# The stand-ins are part of the task: the same for everyone and for ever.
_FIXED = np.random.default_rng(8)
_STATIC = _FIXED.normal(0, 0.4, (10, WIDTH))
_WRIST = _FIXED.normal(0, 0.4, (8, WIDTH))
LANGUAGE = _FIXED.normal(0, 1, (8, WIDTH))


def place_to_touch(discs: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Return the place `[n, 2]` that `task` `[n]` names among `discs` `[n, 4, 2]`."""
    disc = discs[np.arange(len(task)), task // 2]
    place: np.ndarray = disc + np.stack([np.where(task % 2 == 1, OFFSET, -OFFSET), np.zeros(len(task))], axis=-1)
    return place


class Multi8:
    """The task. Info: `task_index`, which of `SENTENCES` is asked.

    Args:
        task: Ask for this task in every episode; None draws it from the seed.
    """

    def __init__(self, task: int | None = None) -> None:
        self._task = task
        parts = {"observation.language": "code", "observation.static": "static", "observation.wrist": "wrist"}
        observation = {key: tuple(f"{part}_{k}" for k in range(WIDTH)) for key, part in parts.items()}
        spec = micro_spec(NAME, observation, ("target_x", "target_y"), 1.5, MAX_STEPS, TASK)
        self.spec = replace(spec, tasks=SENTENCES)

    def begin(self, rng: np.random.Generator) -> State:
        """Draw discs that lie apart, the hand and the task."""
        hand = rng.uniform(-0.2, 0.2, 2)
        while True:
            discs = rng.uniform(-0.8, 0.8, (4, 2))
            things = np.concatenate([discs, hand[None]])
            if (np.linalg.norm(things[:, None] - things, axis=-1) + 2 * np.eye(5)).min() > APART:
                break
        task = rng.integers(8)
        return {"p": hand, "discs": discs, "task": np.array(task if self._task is None else self._task)}

    def observe(self, state: State) -> Observation:
        """Return sentence code and both views, `[n, 16]` each."""
        flat = state["discs"].reshape(-1, 8)
        seen = (state["discs"] - state["p"][:, None]).reshape(-1, 8)
        return {
            "observation.language": LANGUAGE[state["task"]].astype(np.float32),
            "observation.static": np.tanh(np.concatenate([flat, state["p"]], -1) @ _STATIC).astype(np.float32),
            "observation.wrist": np.tanh(seen @ _WRIST).astype(np.float32),
        }

    def step(self, state: State, action: np.ndarray) -> Outcome:
        """Move."""
        p = state["p"] + np.clip(action - state["p"], -REACH, REACH)
        success = np.linalg.norm(p - place_to_touch(state["discs"], state["task"]), axis=-1) < NEAR
        info = {"task_index": state["task"]}
        return Outcome(state | {"p": p}, success.astype(float), success, success, info)

    def draw(self, state: State) -> np.ndarray:
        """Draw discs, hand, and the place to touch as a black dot."""
        canvas = Canvas((-1.1, -1.1), (1.1, 1.1))
        for disc, colour in zip(state["discs"], (RED, GREEN, BLUE, ORANGE), strict=True):
            canvas.disc(disc, 0.09, colour)
        place = place_to_touch(state["discs"][None], state["task"][None])[0]
        canvas.disc(place, 0.02, BLACK)
        canvas.ring(state["p"], 0.06, 0.03, BLACK)
        return canvas.image()


class Multi8Expert:
    """Goes straight to the place, slowing down on the way in."""

    def plan(self, rng: np.random.Generator, state: State) -> Memory:
        """Draw the noise of the motion."""
        return {"noise": ornstein_uhlenbeck(rng, MAX_STEPS, 2, std=0.01)}

    def act(self, state: State, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Return the target."""
        p, place = state["p"], place_to_touch(state["discs"], state["task"])
        gap = np.linalg.norm(place - p, axis=-1, keepdims=True)
        pace = np.minimum(0.06, 0.4 * gap + 0.01)
        noise = memory["noise"][np.arange(len(p)), np.minimum(state["clock"], MAX_STEPS - 1)]
        return p + (place - p) * np.minimum(pace / np.maximum(gap, 1e-9), 1) + noise * np.minimum(1, 5 * gap), memory
