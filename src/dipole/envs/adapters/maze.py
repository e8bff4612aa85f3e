"""PointMaze and AntMaze (gymnasium-robotics): go through a maze to a goal. A ball with forces, or a four-legged ant.

Source: Fu et al. 2020 (D4RL), rewritten by the Farama foundation. Start and goal are drawn among the free cells for
each seed. Reward 1 within 0.45 of the goal, else 0. The ant's `observation.state` begins with its position, which the
package reports as the achieved goal only.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from dipole.envs.adapters.gymnasium_env import (
    GymnasiumEnv,
    Traits,
    box_spec,
    goal_observation,
    import_gymnasium_robotics,
)
from dipole.envs.experts.expert import Expert
from dipole.envs.spec import VectorEnv

# Name of the map in the package, and the time limits for ball and ant.
MAPS = {
    "UMaze": ("U_MAZE", 300, 700),
    "Open": ("OPEN", 300, 700),
    "Medium": ("MEDIUM_MAZE", 600, 1000),
    "Large": ("LARGE_MAZE", 800, 1000),
}
TASKS = {
    f"{kind}/{key}": f"{sentence} to the goal through the maze."
    for kind, sentence in (("pointmaze", "Roll"), ("antmaze", "Walk"))
    for key in MAPS
}
EXPERTS = frozenset(name for name in TASKS if name.startswith("pointmaze/"))


def maze_map(name: str) -> list[list[int]]:
    """Return the map of environment `name`: rows from above, 1 is a wall."""
    import_gymnasium_robotics()
    from gymnasium_robotics.envs.maze import maps

    cells: list[list[int]] = getattr(maps, MAPS[name.split("/")[1]][0])
    return cells


def _environment(name: str) -> Any:
    cells = maze_map(name)
    if name.startswith("pointmaze/"):
        from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv as Maze
    else:
        from gymnasium_robotics.envs.maze.ant_maze_v5 import AntMazeEnv as Maze
    env = Maze(maze_map=cells, continuing_task=True, reset_target=False)
    # The package leaves the model's file behind in the temporary folder.
    with contextlib.suppress(OSError):
        os.remove(env.tmp_xml_file_path)
    return env


def build(name: str, images: bool = False, terminate_on_success: bool = True) -> GymnasiumEnv:
    """Return one environment.

    Args:
        name: `pointmaze/<map>` or `antmaze/<map>`.
        images: Add a picture of the whole maze from above.
        terminate_on_success: End the episode at the goal.
    """
    env = _environment(name)
    point = name.startswith("pointmaze/")
    parts = ("observation",) if point else ("achieved_goal", "observation")
    size = sum(env.observation_space[key].shape[0] for key in parts)
    scale = env.maze.maze_size_scaling
    side = max(env.maze.map_length, env.maze.map_width) * scale
    view = {"lookat": (0.0, 0.0, 0.0), "distance": 1.25 * side, "elevation": -90.0, "azimuth": 90.0}
    spec = box_spec(
        name,
        env,
        {"observation.state": size, "observation.goal": 2},
        max_steps=MAPS[name.split("/")[1]][1 if point else 2],
        fps=100.0 if point else 20.0,
        task=TASKS[name],
    )
    observe = goal_observation({"observation.state": parts, "observation.goal": ("desired_goal",)})
    return GymnasiumEnv(env, spec, Traits(observe, success="success", view=view), images, terminate_on_success)


def build_expert(env: VectorEnv) -> Expert:
    """Return the waypoint follower for the rows of `env`."""
    from dipole.envs.experts.maze import PointMazeExpert

    return PointMazeExpert(maze_map(env.spec.name))
