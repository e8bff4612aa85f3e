"""Gymnasium's MuJoCo locomotion and control tasks. Episodes are judged by their return."""

from __future__ import annotations

from typing import Any

from dipole.envs.adapters.gymnasium_env import GymnasiumEnv, Traits, box_spec
from dipole.envs.rendering import View, import_mujoco

# Sentence, time limit (gymnasium's) and camera of each.
_ENVS: dict[str, tuple[str, int, View]] = {
    "Ant-v5": ("Walk forward on four legs.", 1000, "track"),
    "HalfCheetah-v5": ("Run forward.", 1000, "track"),
    "Hopper-v5": ("Hop forward on one leg.", 1000, "track"),
    "Humanoid-v5": ("Walk forward on two legs.", 1000, "track"),
    "InvertedDoublePendulum-v5": ("Balance the double pole.", 1000, -1),
    "InvertedPendulum-v5": ("Balance the pole.", 1000, -1),
    "Pusher-v5": ("Push the cylinder to the goal.", 100, -1),
    "Reacher-v5": ("Reach the goal with the fingertip.", 50, -1),
    "Swimmer-v5": ("Swim forward.", 1000, "track"),
    "Walker2d-v5": ("Walk forward on two legs.", 1000, "track"),
}
TASKS = {f"gym/{key}": sentence for key, (sentence, _, _) in _ENVS.items()}
EXPERTS: frozenset[str] = frozenset()


def build(name: str, images: bool = False, terminate_on_success: bool = True) -> GymnasiumEnv:
    """Return one environment; there is no success to end at, so `terminate_on_success` changes nothing."""
    import_mujoco()
    import gymnasium

    key = name.split("/")[1]
    sentence, max_steps, camera = _ENVS[key]
    env: Any = gymnasium.make(key).unwrapped
    spec = box_spec(
        name,
        env,
        {"observation.state": env.observation_space.shape[0]},
        max_steps=max_steps,
        fps=1 / env.dt,
        task=sentence,
        score="return",
    )
    return GymnasiumEnv(env, spec, Traits(view=camera), images, terminate_on_success)
