"""Push-T (gym-pusht): push a T-shaped block onto its outline with a round finger.

Source: Florence et al. 2021; Chi et al. 2023 (Diffusion Policy). The arena is 512 x 512 px, control runs at 10 Hz,
an action is the target position of the finger in px. The reward of a step is min(1, coverage / 0.95), where coverage is
the part of the outline that the block covers; an episode is judged by its largest reward and ends when coverage exceeds
0.95.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dipole.data import Feature
from dipole.data.pusht import FPS, TASK
from dipole.envs.spec import EnvSpec, Observation, Transition
from dipole.errors import MissingExtraError

TASKS = {"pusht": TASK, "pusht-image": TASK}
EXPERTS: frozenset[str] = frozenset()
MAX_STEPS = 300

_IMAGE = Feature("image", (96, 96, 3), ("height", "width", "channel"))
_AGENT = Feature("float32", (2,), ("agent_x", "agent_y"))
_KEYPOINTS = Feature("float32", (16,), tuple(f"{axis}{k}" for k in range(8) for axis in "xy"))


def _gym_pusht() -> Any:
    try:
        from gym_pusht.envs.pusht import PushTEnv
    except ImportError:
        raise MissingExtraError("gym-pusht", "envs") from None
    return PushTEnv


class PushT:
    """One Push-T environment.

    Args:
        name: `pusht` (agent position and the block's corners) or `pusht-image` (agent position and a 96 x 96 picture).
        terminate_on_success: End the episode when coverage exceeds 0.95.
        keypoints: With a picture, too, give the block's corners: for a composition of policies of which one acts by
            them and one by the picture.
    """

    def __init__(self, name: str, terminate_on_success: bool = True, keypoints: bool = False) -> None:
        self._images = name == "pusht-image"
        self._keypoints = keypoints or not self._images
        self._terminate = terminate_on_success
        kind = "pixels_agent_pos" if self._images else "environment_state_agent_pos"
        self._env = _gym_pusht()(obs_type=kind, visualization_width=384, visualization_height=384)
        scene = {"observation.image": _IMAGE} if self._images else {}
        if self._keypoints:
            scene["observation.environment_state"] = _KEYPOINTS
        self.spec = EnvSpec(
            name=name,
            observation={"observation.state": _AGENT, **scene},
            action=Feature("float32", (2,), ("target_x", "target_y")),
            action_low=np.zeros(2, dtype=np.float32),
            action_high=np.full(2, 512, dtype=np.float32),
            max_steps=MAX_STEPS,
            fps=FPS,
            task=TASKS[name],
            score="max_reward",
        )

    def _observe(self, raw: dict[str, np.ndarray]) -> Observation:
        obs = {"observation.state": raw["agent_pos"].astype(np.float32)}
        if self._images:
            obs["observation.image"] = raw["pixels"]
        if self._keypoints:
            corners = self._env.get_keypoints(self._env._block_shapes) if self._images else raw["environment_state"]
            obs["observation.environment_state"] = corners.flatten().astype(np.float32)
        return obs

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`. gym-pusht builds a new physics space for each, so nothing is left over."""
        self._env._last_action = None  # else the picture shows the last target of the previous episode
        raw, _ = self._env.reset(seed=seed)
        return self._observe(raw)

    def set_state(self, state: np.ndarray) -> Observation:
        """Put finger and block at rest at `state` (agent x, agent y, block x, block y, block angle) `[5]`.

        gym-pusht's own `reset_to_state` sets the position before the angle. The block turns about its centre of mass,
        not about the point that `position` names, so there it ends up to 90 px away from what was asked for.
        """
        env = self._env
        env._setup()
        env._last_action = None
        env.agent.position = (float(state[0]), float(state[1]))
        env.block.angle = float(state[4])
        env.block.position = (float(state[2]), float(state[3]))
        for body in (env.agent, env.block):
            body.velocity, body.angular_velocity = (0.0, 0.0), 0.0
            env.space.reindex_shapes_for_body(body)
        return self._observe(env.get_obs())

    def step(self, action: np.ndarray) -> Transition:
        """Move the finger's target to `action` `[2]` px for a tenth of a second."""
        raw, reward, reached, _, info = self._env.step(np.asarray(action, dtype=np.float64))
        return Transition(
            obs=self._observe(raw),
            reward=float(reward),
            terminated=bool(reached) and self._terminate,
            success=bool(reached),
            info={"coverage": float(info["coverage"]), "block_pose": info["block_pose"]},
        )

    def render(self) -> np.ndarray:
        """Return a picture, uint8 `[384, 384, 3]`."""
        picture: np.ndarray = self._env.render()
        return picture

    def close(self) -> None:
        """Free the environment."""
        self._env.close()


def build(name: str, terminate_on_success: bool = True, keypoints: bool = False) -> PushT:
    """Return one environment; the options are those of `PushT`."""
    return PushT(name, terminate_on_success, keypoints)
