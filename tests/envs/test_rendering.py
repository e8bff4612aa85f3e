"""Pictures of MuJoCo models: the quick settings, and what is said where there is no graphics library."""

import os
import subprocess
import sys

import numpy as np
import pytest
from envs_helpers import needs, needs_rendering

from dipole.envs import rendering
from dipole.envs.rendering import Camera, can_render, fast_render, import_mujoco

pytestmark = needs("mujoco")

MODEL = """
<mujoco>
  <asset><material name="mirror" reflectance="0.5"/></asset>
  <worldbody>
    <light pos="0 0 3" castshadow="true"/>
    <geom type="plane" size="2 2 1" material="mirror" rgba="0.2 0.2 0.8 1"/>
    <geom type="sphere" size="0.5" pos="0 0 0.5" rgba="0.9 0.1 0.1 1"/>
    <camera name="top" pos="0 0 4"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def model():
    return import_mujoco().MjModel.from_xml_string(MODEL)


def test_fast_render_turns_off_what_is_slow(model):
    fast_render(model, 96, 64)
    assert not model.light_castshadow.any()
    assert not model.mat_reflectance.any()
    assert model.vis.quality.offsamples == 0
    assert (model.vis.global_.offwidth, model.vis.global_.offheight) == (96, 64)


def test_camera_draws_what_it_looks_at(model):
    needs_rendering()
    mujoco = import_mujoco()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for view in ("top", {"lookat": (0, 0, 0), "distance": 4.0, "azimuth": 90.0, "elevation": -90.0}):
        camera = Camera(model, 64, 48, view)
        picture = camera.picture(data)
        assert picture.shape == (48, 64, 3)
        red, blue = picture[24, 32].astype(int), picture[4, 4].astype(int)
        assert red[0] > red[2] + 50  # the sphere in the middle
        assert blue[2] > blue[0] + 50  # the floor in the corner
        camera.close()
        camera.close()
    assert not model.light_castshadow.any()


def test_drawing_is_repeatable(model):
    needs_rendering()
    mujoco = import_mujoco()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    first, second = Camera(model, 32, 32, "top"), Camera(model, 32, 32, "top")
    assert np.array_equal(first.picture(data), second.picture(data))
    first.close()
    second.close()


def _run(code, **environment):
    full = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, check=False)


def test_without_graphics_one_line_says_what_to_install():
    code = f"""
from dipole.envs.rendering import Camera, import_mujoco
from dipole.errors import DipoleError
mujoco = import_mujoco()
model = mujoco.MjModel.from_xml_string('''{MODEL}''')
data = mujoco.MjData(model)
mujoco.mj_step(model, data)  # physics needs no graphics
try:
    Camera(model, 8, 8).picture(data)
except DipoleError as error:
    print(error)
"""
    found = _run(code, MUJOCO_GL="disabled")
    assert "libegl1" in found.stdout, found.stderr
    assert len(found.stdout.strip().splitlines()) == 1


def test_the_probe_answers_and_never_crashes(monkeypatch):
    assert can_render() in (True, False)
    for broken in ("import os; os.abort()", "raise SystemExit(3)"):
        monkeypatch.setattr(rendering, "_PROBE", broken)
        assert can_render.__wrapped__() is False
