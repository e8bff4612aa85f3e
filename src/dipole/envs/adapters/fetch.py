"""Fetch (gymnasium-robotics): a 7-joint arm that reaches, pushes, slides or places a block, told the goal position.

Source: Plappert et al. 2018. The action is the gripper's displacement (three numbers in [-1, 1], 5 cm each) and the
opening of the fingers. Reward 0 within 5 cm of the goal, else -1, at every step.
"""

from __future__ import annotations

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

TASKS = {
    "fetch/Reach": "Move the gripper to the goal.",
    "fetch/Push": "Push the block to the goal.",
    "fetch/Slide": "Hit the puck so that it slides to the goal.",
    "fetch/PickAndPlace": "Pick up the block and bring it to the goal.",
}
EXPERTS = frozenset({"fetch/Reach", "fetch/Push", "fetch/PickAndPlace"})
_VIEW = {"lookat": (1.3, 0.75, 0.55), "distance": 1.6, "azimuth": 132.0, "elevation": -14.0}


def _show_goal(env: Any) -> None:
    """Move the goal's marker in the drawn state only: the package's own way runs the physics once more."""
    env.data.site("target0").xpos[:] = env.goal


def build(name: str, images: bool = False, terminate_on_success: bool = True) -> GymnasiumEnv:
    """Return one environment.

    Args:
        name: `fetch/<task>`.
        images: Add a picture.
        terminate_on_success: End the episode when the goal is reached.
    """
    robotics = import_gymnasium_robotics()
    import gymnasium

    gymnasium.register_envs(robotics)
    env: Any = gymnasium.make(f"Fetch{name.split('/')[1]}-v4").unwrapped
    spaces = env.observation_space
    sizes = {"observation.state": spaces["observation"].shape[0], "observation.goal": 3}
    spec = box_spec(name, env, sizes, max_steps=50, fps=25.0, task=TASKS[name])
    observe = goal_observation({"observation.state": ("observation",), "observation.goal": ("desired_goal",)})
    traits = Traits(observe, success="is_success", view=_VIEW, before_picture=_show_goal)
    return GymnasiumEnv(env, spec, traits, images, terminate_on_success)


def build_expert(env: VectorEnv) -> Expert:
    """Return the scripted arm for the rows of `env`."""
    from dipole.envs.experts.fetch import FetchExpert

    return FetchExpert(env.spec.name.split("/")[1])
