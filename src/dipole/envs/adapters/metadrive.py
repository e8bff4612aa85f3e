"""MetaDrive: drive through generated roads with traffic to a destination, seen from above.

Source: Li et al., "MetaDrive: Composing Diverse Driving Scenarios for Generalizable Reinforcement Learning" (2021). Two
names for two ways of driving: `metadrive/Drive` takes steering and throttle ten times a second; `metadrive/Plan` takes
the pose to be at half a second later, relative to the present one (dx, dy in metres, dheading), and steers there by
itself, as planners expect. The simulator runs without its assets and without a window; it allows one environment per
process, so several rows need `mode="async"` with one worker each.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, ClassVar

import numpy as np

from dipole.data import Feature
from dipole.envs.adapters.metadrive_view import CELLS, CHANNELS, Road, draw, picture, survey, to_ego
from dipole.envs.experts.expert import Expert
from dipole.envs.spec import EnvSpec, Observation, Transition, VectorEnv
from dipole.errors import DipoleError, MissingExtraError

TASKS = {
    "metadrive/Drive": "Drive to the destination without a collision.",
    "metadrive/Plan": "Plan the way to the destination without a collision.",
}
EXPERTS = frozenset(TASKS)
SUBSTEPS, TICK = 5, 0.1  # ticks of the simulator in a step of `Plan`, seconds of a tick
SCENARIOS = 300_000
_EVALUATION = 100_000  # first seed of evaluations; later seeds wrap round to it, never to those of demonstrations
_MAX_INCREMENT = (8.0, 4.0, 0.8)  # in half a second: 16 m/s ahead
# Steering of `Plan`: it aims at least so far ahead (m), and its throttle answers an error of speed (m/s).
_LOOK_AHEAD, _GAIN = 4.0, 0.4


def _import() -> Any:
    try:
        from metadrive.engine.base_engine import BaseEngine
        from metadrive.envs.metadrive_env import MetaDriveEnv
    except ImportError:
        raise MissingExtraError("metadrive-simulator", "drive") from None
    # It would download pictures and models for windows that we do not open.
    BaseEngine.try_pull_asset = staticmethod(lambda: None)
    return MetaDriveEnv


class MetaDrive:
    """One environment.

    Args:
        name: `metadrive/Drive` or `metadrive/Plan`.
        blocks: Road blocks (curves, crossings, roundabouts, ...) of a map.
        traffic: Density of traffic.
        terminate_on_success: End the episode at the destination (where the road ends as well).
    """

    alive: ClassVar[bool] = False

    def __init__(self, name: str, blocks: int, traffic: float, terminate_on_success: bool) -> None:
        environment = _import()
        if MetaDrive.alive:
            raise DipoleError(
                "MetaDrive allows one environment per process: close the other, or use mode='async' with num_workers "
                "equal to num_envs"
            )
        self.plans, self._terminate = name.endswith("/Plan"), terminate_on_success
        config = {
            "start_seed": 0,
            "num_scenarios": SCENARIOS,
            "map": blocks,
            "traffic_density": traffic,
            "store_map": False,
            "horizon": None,
            "log_level": logging.CRITICAL,
            "out_of_road_done": True,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.env = environment(config)
        MetaDrive.alive = True
        self._road: Road | None = None
        self.spec = _spec(name, self.plans)

    @property
    def vehicle(self) -> Any:
        """Return the ego vehicle of the simulator."""
        return self.env.agent

    def pose(self) -> np.ndarray:
        """Return x, y (m) and heading (rad) of the ego vehicle in the world."""
        return np.array([*self.vehicle.position, self.vehicle.heading_theta], dtype=np.float64)

    def boxes(self) -> np.ndarray:
        """Return the other vehicles `[M, 5]`: x, y, heading, half length, half width."""
        others = [v for v in self.env.engine.traffic_manager.traffic_vehicles if v is not self.vehicle]
        found = [[*v.position, v.heading_theta, v.top_down_length / 2, v.top_down_width / 2] for v in others]
        return np.array(found, dtype=np.float64).reshape(-1, 5)

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`."""
        scenario = seed if seed < SCENARIOS else _EVALUATION + (seed - _EVALUATION) % (SCENARIOS - _EVALUATION)
        with contextlib.redirect_stdout(io.StringIO()):
            self.env.reset(seed=scenario)
        navigation = self.vehicle.navigation
        self._road = survey(self.env.current_map.road_network, list(navigation.checkpoints))
        return self._observe()

    def _observe(self) -> Observation:
        assert self._road is not None
        vehicle, pose = self.vehicle, self.pose()
        destination = to_ego(np.array(vehicle.navigation.final_lane.end, dtype=np.float64)[None, :2], pose)[0]
        state = [vehicle.speed, vehicle.steering, vehicle.throttle_brake, *destination]
        return {
            "observation.state": np.array(state, dtype=np.float32),
            "observation.scene": draw(self._road, pose, self.boxes()),
        }

    def step(self, action: np.ndarray) -> Transition:
        """Drive for a tick, or towards the planned pose for five."""
        reward, info, done = 0.0, {}, False
        goal = None
        if self.plans:
            goal = _ahead(self.pose(), action)
        for tick in range(SUBSTEPS if self.plans else 1):
            command = action if goal is None else self._steer(goal, (SUBSTEPS - tick) * TICK)
            _, earned, done, _, info = self.env.step([float(value) for value in command])
            reward += float(earned)
            if done:
                break
        success = bool(info["arrive_dest"])
        facts = {key: info[key] for key in ("crash", "out_of_road", "route_completion")}
        return Transition(self._observe(), reward, bool(done) and (self._terminate or not success), success, facts)

    def _steer(self, goal: np.ndarray, left: float) -> tuple[float, float]:
        """Return steering and throttle towards pose `goal`, to be reached in `left` seconds (pure pursuit)."""
        vehicle, pose = self.vehicle, self.pose()
        rest = to_ego(goal[None, :2], pose)[0]
        short = max(0.0, _LOOK_AHEAD - float(np.hypot(*rest)))
        heading = goal[2] - pose[2]
        aim = rest + short * np.array([np.cos(heading), np.sin(heading)])
        bend = 2 * aim[1] / max(float(aim @ aim), 1.0)
        base = vehicle.FRONT_WHEELBASE + vehicle.REAR_WHEELBASE
        steering = np.degrees(np.arctan(bend * base)) / vehicle.max_steering
        wanted = max(float(rest[0]), 0.0) / left
        return float(np.clip(steering, -1, 1)), float(np.clip(_GAIN * (wanted - vehicle.speed), -1, 1))

    def render(self) -> np.ndarray:
        """Return the view as a picture, uint8 `[256, 256, 3]`."""
        return picture(self._observe()["observation.scene"])

    def close(self) -> None:
        """Close the simulator. May be called twice."""
        if self.env is not None:
            self.env.close()
            self.env, MetaDrive.alive = None, False


def _ahead(pose: np.ndarray, increment: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    dx, dy, turn = (float(value) for value in increment)
    return np.array([pose[0] + cos * dx - sin * dy, pose[1] + sin * dx + cos * dy, pose[2] + turn])


def _spec(name: str, plans: bool) -> EnvSpec:
    state = ("speed", "steering", "throttle", "destination_x", "destination_y")
    high = np.array(_MAX_INCREMENT if plans else (1.0, 1.0), dtype=np.float32)
    parts = ("dx", "dy", "dheading") if plans else ("steering", "throttle")
    return EnvSpec(
        name=name,
        observation={
            "observation.state": Feature("float32", (len(state),), state),
            "observation.scene": Feature("float32", (*CELLS, len(CHANNELS)), ("x", "y", "channel")),
        },
        action=Feature("float32", (len(parts),), parts),
        action_low=-high,
        action_high=high,
        max_steps=200 if plans else 1000,
        fps=2.0 if plans else 10.0,
        task=TASKS[name],
    )


def build(name: str, blocks: int = 3, traffic: float = 0.1, terminate_on_success: bool = True) -> MetaDrive:
    """Return one environment; see `MetaDrive`."""
    return MetaDrive(name, blocks, traffic, terminate_on_success)


def build_expert(env: VectorEnv) -> Expert:
    """Return the intelligent driver model for the rows of `env`."""
    from dipole.envs.experts.metadrive import IdmExpert

    return IdmExpert(env)
