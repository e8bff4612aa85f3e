"""Contact tasks in MuJoCo with a sense of touch. `contact/Wipe`: sweep a compliant tool along an uneven surface.

A ball-shaped tool slides along x and z, pulled by soft servos (50 N/m along z) towards the position (x, z) that is the
action: pressed 2 cm too deep it pushes with 1 N. A touch sensor measures the normal force at its tip. As in
`micro/wipe`, it shall sweep from x = 0 to 1 in 128 ticks at 24 Hz with 0.5 to 1.5 N; where the tool is and how high the
surface stands there (+- 3 cm) is seen every 16 ticks and 4 ticks late, while the force is felt at every tick; and
at a random tick the surface rises or sinks by 6 cm within three ticks. Reward: 1/128 per tick in the band.
"""

from __future__ import annotations

import numpy as np

from dipole.data import Feature
from dipole.envs.experts.expert import Collecting, Expert
from dipole.envs.micro.wipe import BAND, JUMP_TICKS, SEEN_STD, SLOW_EVERY, SLOW_LATE, TARGET, TICKS, surface
from dipole.envs.rendering import PICTURE, Camera, import_mujoco
from dipole.envs.spec import EnvSpec, Observation, Transition, VectorEnv

__all__ = ["BAND", "ContactWipe", "build", "build_expert"]

TASKS = {"contact/Wipe": "Sweep along the surface with an even force."}
EXPERTS = frozenset(TASKS)
COLLECTING = {"contact/Wipe": Collecting(success_only=False, steps_after_success=None)}
FPS, SUBSTEPS = 24.0, 20
STIFFNESS = 50.0  # N/m of the servo along z
SHIFT, SHIFT_TICKS = 0.06, 3
_COLUMNS, _LOW, _RANGE = 221, -0.1, 0.2  # of the height field, in m
_LEFT, _RIGHT = -0.05, 1.05

_MODEL = f"""
<mujoco>
  <option timestep="{1 / FPS / SUBSTEPS}" gravity="0 0 0" integrator="implicitfast"/>
  <asset><hfield name="surface" nrow="4" ncol="{_COLUMNS}" size="{(_RIGHT - _LEFT) / 2} 0.1 {_RANGE} 0.2"/></asset>
  <worldbody>
    <light pos="0.5 -1 2" dir="0 0.4 -1"/>
    <geom name="surface" type="hfield" hfield="surface" pos="{(_LEFT + _RIGHT) / 2} 0 {_LOW}" friction="0.1"
      rgba="0.6 0.6 0.65 1"/>
    <body name="tool">
      <joint name="x" type="slide" axis="1 0 0" damping="20"/>
      <joint name="z" type="slide" axis="0 0 1" damping="4.5"/>
      <geom type="sphere" size="0.02" pos="0 0 0.02" mass="0.1" friction="0.1" rgba="0.2 0.4 0.9 1"/>
      <geom type="capsule" fromto="0 0 0.03 0 0 0.25" size="0.008" mass="0" contype="0" conaffinity="0"
        rgba="0.2 0.4 0.9 1"/>
      <site name="tip" pos="0 0 0.02" size="0.025" rgba="0 0 0 0"/>
    </body>
  </worldbody>
  <actuator>
    <position joint="x" kp="1000"/>
    <position joint="z" kp="{STIFFNESS}"/>
  </actuator>
  <sensor><touch site="tip"/></sensor>
</mujoco>
"""
_VIEW = {"lookat": (0.5, 0.0, 0.0), "distance": 1.5, "azimuth": 90.0, "elevation": -10.0}


class ContactWipe:
    """One environment.

    Attributes:
        shift_tick: Tick at which the surface of this episode begins to move.
        command: The position (x, z) the tool was last sent to.
    """

    def __init__(self) -> None:
        self._mujoco = import_mujoco()
        self.model = self._mujoco.MjModel.from_xml_string(_MODEL)
        self.data = self._mujoco.MjData(self.model)
        self._camera: Camera | None = None
        self.shift_tick, self._shift, self._tick = TICKS, 0.0, 0
        self.command = np.zeros(2)
        self.spec = EnvSpec(
            name="contact/Wipe",
            observation={
                "observation.state": Feature("float32", (3,), ("seen_x", "seen_z", "seen_h")),
                "observation.force": Feature("float32", (1,), ("force",)),
            },
            action=Feature("float32", (2,), ("x", "z")),
            action_low=np.array([0.0, -0.3], dtype=np.float32),
            action_high=np.array([1.0, 0.3], dtype=np.float32),
            max_steps=TICKS,
            fps=FPS,
            task=TASKS["contact/Wipe"],
            score="return",
        )

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`: the tool rests on the surface with 1 N."""
        rng = np.random.default_rng(seed)
        amplitude = rng.uniform([0.03, 0.01], [0.05, 0.02])
        self._waves = np.stack([amplitude, rng.uniform(0, 2 * np.pi, 2)], axis=-1)
        self._misread = rng.normal(0, SEEN_STD, TICKS // SLOW_EVERY + 1)
        self.shift_tick = int(rng.integers(*JUMP_TICKS))
        self._shift, self._tick = SHIFT * float(rng.choice([-1.0, 1.0])), 0
        heights = self._height(np.linspace(_LEFT, _RIGHT, _COLUMNS))
        self.model.hfield_data[:] = np.tile((heights - _LOW) / _RANGE, 4)
        self._mujoco.mj_resetData(self.model, self.data)
        self._move_surface(0.0)
        start = float(self._height(np.zeros(1))[0])
        self.data.qpos[:] = (0.0, start)
        self.command = np.array([0.0, start - TARGET / STIFFNESS])
        self.data.ctrl[:] = self.command
        for _ in range(2 * SUBSTEPS):
            self._mujoco.mj_step(self.model, self.data)
        if self._camera is not None:  # the height field is kept on the graphics side
            self._camera.close()
            self._camera = None
        self._seen = self._pending = self._look()
        return self._observe()

    def _height(self, x: np.ndarray) -> np.ndarray:
        return surface(x, np.broadcast_to(self._waves, (*np.shape(x), 2, 2)))

    def _move_surface(self, by: float) -> None:
        self.model.geom("surface").pos[2] = _LOW + by
        self._offset = by

    def _look(self) -> np.ndarray:
        x, z = self.data.qpos
        return np.array([x, z, self._height(np.array([x]))[0] + self._misread[self._tick // SLOW_EVERY]])

    @property
    def force(self) -> float:
        """Return the normal force at the tip in N."""
        return float(self.data.sensordata[0])

    def _observe(self) -> Observation:
        force = np.array([self.force], dtype=np.float32)
        return {"observation.state": self._seen.astype(np.float32), "observation.force": force}

    def step(self, action: np.ndarray) -> Transition:
        """Pull the tool towards `action` for a tick."""
        self.command = np.asarray(action, dtype=np.float64)
        self.data.ctrl[:] = self.command
        for substep in range(SUBSTEPS):
            done = (self._tick + (substep + 1) / SUBSTEPS - self.shift_tick) / SHIFT_TICKS
            self._move_surface(self._shift * float(np.clip(done, 0, 1)))
            self._mujoco.mj_step(self.model, self.data)
        self._tick += 1
        if self._tick % SLOW_EVERY == 0:
            self._pending = self._look()
        if self._tick % SLOW_EVERY == SLOW_LATE:
            self._seen = self._pending
        in_band = BAND[0] <= self.force <= BAND[1]
        success = self._tick >= TICKS and self.data.qpos[0] > 0.95 and in_band
        info = {"force": self.force, "in_band": in_band, "after_jump": self._tick >= self.shift_tick}
        return Transition(self._observe(), in_band / TICKS, False, bool(success), info)

    def render(self) -> np.ndarray:
        """Return a picture, uint8 `[256, 256, 3]`."""
        if self._camera is None:
            self._camera = Camera(self.model, PICTURE, PICTURE, _VIEW)
        return self._camera.picture(self.data)

    def close(self) -> None:
        """Free the graphics context."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None


def build(name: str, terminate_on_success: bool = True) -> ContactWipe:
    """Return one environment; its episodes all have the same length, whatever `terminate_on_success`."""
    return ContactWipe()


def build_expert(env: VectorEnv) -> Expert:
    """Return the demonstrator for the rows of `env`."""
    from dipole.envs.experts.contact import WipeExpert

    return WipeExpert(env)
