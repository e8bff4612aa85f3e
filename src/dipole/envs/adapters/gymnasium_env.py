"""A `SingleEnv` made of a gymnasium environment, its spec and a few functions; other adapters build on it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from dipole.data import Feature
from dipole.envs.rendering import PICTURE, Camera, View, import_mujoco
from dipole.envs.spec import EnvSpec, Observation, Transition
from dipole.errors import MissingExtraError

SIDE = 96  # of an observed picture, in px


def import_gymnasium_robotics() -> ModuleType:
    """Import and return `gymnasium_robotics`, without the notice about hands that it prints.

    Raises:
        MissingExtraError: It is not installed.
    """
    import_mujoco()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import gymnasium_robotics
    except ImportError:
        raise MissingExtraError("gymnasium-robotics", "envs") from None
    module: ModuleType = gymnasium_robotics
    return module


def _as_state(raw: np.ndarray) -> Observation:
    return {"observation.state": np.asarray(raw, dtype=np.float32)}


def _no_options(seed: int) -> None:
    return None


@dataclass(frozen=True)
class Traits:
    """What the adapter has to know about an environment beside its spec.

    Attributes:
        observe: Turns a raw observation into named arrays.
        reset_options: Returns gymnasium's reset options for a seed.
        success: Key of the step's info that says whether the goal holds, or None.
        view: Camera of pictures.
        before_picture: Called with the environment before each picture; must not touch the physics.
    """

    observe: Callable[[Any], Observation] = _as_state
    reset_options: Callable[[int], dict[str, Any] | None] = _no_options
    success: str | None = None
    view: View = -1
    before_picture: Callable[[Any], None] | None = None


class GymnasiumEnv:
    """One gymnasium environment with MuJoCo physics.

    Args:
        env: The environment without wrappers (in particular without a time limit, which is the vectoriser's business).
        spec: Its spec, without pictures.
        traits: See `Traits`.
        images: Add `observation.image`, 96 x 96.
        terminate_on_success: End the episode at the first success.
    """

    def __init__(self, env: Any, spec: EnvSpec, traits: Traits, images: bool, terminate_on_success: bool) -> None:
        self.env = env
        self.spec = spec
        if images:
            picture = Feature("image", (SIDE, SIDE, 3), ("height", "width", "channel"))
            self.spec = replace(spec, observation={**spec.observation, "observation.image": picture})
        self._traits, self._images, self._terminate = traits, images, terminate_on_success
        self._cameras: dict[int, Camera] = {}

    def _picture(self, side: int) -> np.ndarray:
        if side not in self._cameras:
            self._cameras[side] = Camera(self.env.model, side, side, self._traits.view)
        if self._traits.before_picture is not None:
            self._traits.before_picture(self.env)
        return self._cameras[side].picture(self.env.data)

    def _observe(self, raw: Any) -> Observation:
        obs = self._traits.observe(raw)
        return obs | {"observation.image": self._picture(SIDE)} if self._images else obs

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`."""
        raw, _ = self.env.reset(seed=seed, options=self._traits.reset_options(seed))
        return self._observe(raw)

    def step(self, action: np.ndarray) -> Transition:
        """Apply `action` `[Da]`."""
        raw, reward, terminated, _, info = self.env.step(action)
        success = bool(info[self._traits.success]) if self._traits.success is not None else False
        ends = bool(terminated) or (success and self._terminate)
        return Transition(self._observe(raw), float(reward), ends, success, dict(info))

    def render(self) -> np.ndarray:
        """Return a picture, uint8 `[256, 256, 3]`."""
        return self._picture(PICTURE)

    def close(self) -> None:
        """Free graphics contexts and the environment."""
        while self._cameras:
            self._cameras.popitem()[1].close()
        self.env.close()


def goal_observation(keys: Mapping[str, tuple[str, ...]]) -> Callable[[Mapping[str, np.ndarray]], Observation]:
    """Return an `observe` for dict observations: feature name to the raw keys it joins."""

    def observe(raw: Mapping[str, np.ndarray]) -> Observation:
        return {name: np.concatenate([raw[key] for key in parts]).astype(np.float32) for name, parts in keys.items()}

    return observe


def box_spec(name: str, env: Any, sizes: Mapping[str, int], **facts: Any) -> EnvSpec:
    """Return a spec with float32 observations of the given sizes and the environment's own action bounds."""
    space = env.action_space
    return EnvSpec(
        name=name,
        observation={key: Feature("float32", (size,)) for key, size in sizes.items()},
        action=Feature("float32", tuple(space.shape)),
        action_low=np.asarray(space.low, dtype=np.float32),
        action_high=np.asarray(space.high, dtype=np.float32),
        **facts,
    )
