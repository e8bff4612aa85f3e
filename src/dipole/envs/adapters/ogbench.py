"""OGBench: goal-conditioned mazes, soccer and table-top manipulation (Park et al. 2025).

Each environment poses five tasks; seed s poses task 1 + s mod 5, unless `random_goals` draws start and goal at random
(for demonstrations that cover everything). `observation.goal` is the observation of a goal state. Reward 1 at the goal,
else 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from dipole.envs.adapters.gymnasium_env import GymnasiumEnv, Traits, box_spec
from dipole.envs.experts.expert import Collecting, Expert
from dipole.envs.rendering import import_mujoco
from dipole.envs.spec import Observation, VectorEnv
from dipole.errors import DipoleError, MissingExtraError

NUM_TASKS = 5
_MAZES = ("medium", "large", "giant")
# Sentence and the benchmark's time limit.
_ENVS = {
    **{f"pointmaze-{size}-v0": ("Move to the goal through the maze.", 1000) for size in _MAZES},
    **{f"antmaze-{size}-v0": ("Walk to the goal through the maze.", 1000) for size in _MAZES},
    **{f"humanoidmaze-{size}-v0": ("Walk to the goal through the maze.", 2000) for size in ("medium", "large")},
    "humanoidmaze-giant-v0": ("Walk to the goal through the maze.", 4000),
    "antsoccer-arena-v0": ("Dribble the ball to the goal.", 1000),
    "antsoccer-medium-v0": ("Dribble the ball to the goal through the maze.", 1000),
    "cube-single-v0": ("Put the cube where it belongs.", 200),
    "cube-double-v0": ("Put both cubes where they belong.", 500),
    "cube-triple-v0": ("Put the three cubes where they belong.", 1000),
    "cube-quadruple-v0": ("Put the four cubes where they belong.", 1000),
    "scene-v0": ("Arrange cube, drawer, window and buttons as in the goal.", 750),
    "puzzle-3x3-v0": ("Press buttons until their colours are those of the goal.", 500),
    "puzzle-4x4-v0": ("Press buttons until their colours are those of the goal.", 500),
    "puzzle-4x5-v0": ("Press buttons until their colours are those of the goal.", 1000),
    "puzzle-4x6-v0": ("Press buttons until their colours are those of the goal.", 1000),
}
TASKS = {f"ogbench/{key}": sentence for key, (sentence, _) in _ENVS.items()}
_POINT = frozenset(f"ogbench/pointmaze-{size}-v0" for size in _MAZES)
_CUBES = frozenset({"ogbench/cube-single-v0", "ogbench/cube-double-v0"})
EXPERTS = _POINT | _CUBES
COLLECTING = {
    name: Collecting(options={"terminate_on_success": False, "random_goals": True}) for name in sorted(_POINT)
} | {name: Collecting(options={"terminate_on_success": False}) for name in sorted(_CUBES)}


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator for a while: OGBench draws from it when it resets."""
    outside = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(outside)  # noqa: NPY002


def _seedable(env: Any) -> Any:
    """Return `env` with one action space for good: some environments make a new, unseeded one at every access."""
    space = env.action_space
    if env.action_space is not space:
        env.__class__ = type(env.__class__.__name__, (env.__class__,), {"action_space": space})
    return env


class Goals:
    """An OGBench environment that reports its goal with every observation and is determined by its seed.

    Args:
        env: The environment without wrappers.
        random_goals: Draw start and goal at random.
    """

    def __init__(self, env: Any, random_goals: bool) -> None:
        self.env = _seedable(env)
        self.action_space = self.env.action_space
        self.info: dict[str, Any] = {}
        self._random_goals = random_goals
        self._goal = np.zeros(0)
        self._task = 0

    @property
    def model(self) -> Any:
        """The `mjModel`."""
        return self.env.model

    @property
    def data(self) -> Any:
        """The `mjData`."""
        return self.env.data

    def reset(self, seed: int, options: None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episode of `seed`."""
        self._task = seed % NUM_TASKS
        pose: dict[str, Any] = {"task_id": self._task + 1}
        if self._random_goals:
            pose = {"task_info": _random_task(self.env, np.random.default_rng(seed))}
        self.action_space.seed(seed)
        with _global_seed(seed):
            raw, self.info = self.env.reset(seed=seed, options=pose)
        self._goal = self.info["goal"]
        return {"observation": raw, "goal": self._goal}, self.info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Apply `action`; info gets `task_index` and drops what is only of use to experts."""
        raw, reward, _, _, self.info = self.env.step(action)
        success = bool(self.info["success"])
        info = {"success": success, "task_index": 0 if self._random_goals else self._task}
        return {"observation": raw, "goal": self._goal}, float(reward), False, False, info

    def close(self) -> None:
        """Free the environment."""
        self.env.close()


def _random_task(env: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Return a task with random start and goal: two free cells of a maze, or places on the table."""
    if hasattr(env, "maze_map"):
        cells = [(int(i), int(j)) for i, j in np.argwhere(env.maze_map == 0)]
        start, goal = rng.choice(len(cells), 2, replace=False)
        return {"init_ij": cells[start], "goal_ij": cells[goal]}
    low, high = env._object_sampling_bounds
    while True:
        places = np.full((2 * env._num_cubes, 3), 0.02)  # half a cube above the table
        places[:, :2] = rng.uniform(low, high, (len(places), 2))
        gaps = np.linalg.norm(places[:, None] - places, axis=-1) + 2 * np.eye(len(places))
        # Cubes are 4 cm wide; the fingers need some room beside them.
        if gaps.min() > 0.1:
            return {"init_xyzs": places[: env._num_cubes], "goal_xyzs": places[env._num_cubes :]}


def _observe(raw: dict[str, np.ndarray]) -> Observation:
    return {
        "observation.state": raw["observation"].astype(np.float32),
        "observation.goal": raw["goal"].astype(np.float32),
    }


def build(
    name: str, images: bool = False, terminate_on_success: bool = True, random_goals: bool = False
) -> GymnasiumEnv:
    """Return one environment.

    Args:
        name: `ogbench/<environment>`.
        images: Add a picture.
        terminate_on_success: End the episode at the goal.
        random_goals: Random start and goal instead of the benchmark's tasks (mazes and cubes).
    """
    import_mujoco()
    try:
        import ogbench  # noqa: F401  (registers the environments)
    except ImportError:
        raise MissingExtraError("ogbench", "envs") from None
    import gymnasium

    key = name.split("/")[1]
    sentence, max_steps = _ENVS[key]
    maze = "maze" in key
    if random_goals and not (maze or key.startswith("cube")):
        raise DipoleError(f"environment '{name}' has no random goals: only mazes and cubes have")
    env: Any = gymnasium.make(key, disable_env_checker=True).unwrapped
    goals = Goals(env, random_goals)
    raw, _ = goals.reset(0, None)
    sizes = {"observation.state": len(raw["observation"]), "observation.goal": len(raw["goal"])}
    tasks = () if random_goals else tuple(f"{sentence} (task {k + 1})" for k in range(NUM_TASKS))
    fps = 10.0 if key.startswith("point") else 20.0
    spec = box_spec(name, goals, sizes, max_steps=max_steps, fps=fps, task=sentence, tasks=tasks)
    view: Any = "front"
    if hasattr(env, "maze_map"):
        # The package leaves the model's file behind in the temporary folder.
        with contextlib.suppress(OSError):
            os.remove(env.fullpath)
        rows, columns = env.maze_map.shape
        centre = (2.0 * (columns - 3), 2.0 * (rows - 3), 0.0)
        view = {"lookat": centre, "distance": 5.0 * (columns - 2), "azimuth": 90.0, "elevation": -90.0}
    return GymnasiumEnv(goals, spec, Traits(_observe, success="success", view=view), images, terminate_on_success)


def build_expert(env: VectorEnv) -> Expert:
    """Return an expert for the rows of `env`: a waypoint follower for the point, the package's oracle for cubes."""
    from dipole.envs.experts.ogbench import CubeExpert, PointExpert
    from dipole.envs.vector import SyncVector

    if not isinstance(env, SyncVector):
        raise DipoleError(f"the expert of '{env.spec.name}' looks into the simulator: build it with mode 'sync'")
    inner = [single.env for single in env.envs if isinstance(single, GymnasiumEnv)]
    return PointExpert(inner) if env.spec.name in _POINT else CubeExpert(inner)
