"""Off-screen pictures of MuJoCo models: quick on a machine without a graphics card, and a clear error where impossible.

MuJoCo's defaults (a 4096 x 4096 shadow map, mirrors, fourfold multisampling) make software rendering 10 to 40 times
slower. `fast_render` turns them off. The pictures differ from those of published datasets, so demonstrations and
evaluation must both be rendered this way: every MuJoCo adapter does.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from dipole.errors import DipoleError, MissingExtraError

View = str | int | Mapping[str, Any]
PICTURE = 256  # side of the pictures of `render`, in px
_HOW_TO_MEND = "install a software EGL (apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri), set MUJOCO_GL=egl"
_PROBE = """
from dipole.envs.rendering import import_mujoco
mujoco = import_mujoco()
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().any()
renderer.close()
"""
_PROBE_SECONDS = 120  # a cold start of Python, MuJoCo and Mesa takes 1 to 3 s, on a crowded machine a minute


def _has_egl() -> bool:
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    return True


def import_mujoco() -> ModuleType:
    """Import and return `mujoco`, choosing EGL on Linux when nothing was chosen.

    MuJoCo picks its graphics library once, when it is first imported, so adapters call this before their simulator.
    Without EGL rendering is disabled, and simulation still works.

    Raises:
        MissingExtraError: MuJoCo is not installed.
        DipoleError: The chosen graphics library cannot be loaded.
    """
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl" if _has_egl() else "disabled")
    try:
        import mujoco
    except ModuleNotFoundError:
        raise MissingExtraError("mujoco", "envs") from None
    except (ImportError, AttributeError, RuntimeError) as error:
        backend = os.environ.get("MUJOCO_GL")
        raise DipoleError(f"MuJoCo cannot load MUJOCO_GL={backend} ({error}): {_HOW_TO_MEND}") from None
    module: ModuleType = mujoco
    return module


@functools.cache
def can_render() -> bool:
    """Whether MuJoCo can draw on this machine. Tried in a process of its own, as broken drivers crash the process."""
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0


def fast_render(model: Any, width: int, height: int) -> None:
    """Turn off shadows, mirrors and multisampling of an `mjModel` and size its frame. Call before its first picture."""
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    model.vis.quality.offsamples = 0
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height


class Camera:
    """Draws one MuJoCo model from one of its cameras, with `fast_render`'s settings.

    The graphics context is made at the first picture.

    Args:
        model: The `mjModel`.
        width: Width in px.
        height: Height in px.
        view: Name or number of a camera of the model (-1 is the free one), or `lookat` `[3]`, `distance`, `azimuth` and
            `elevation` (degrees) of a free one.
    """

    def __init__(self, model: Any, width: int, height: int, view: View = -1) -> None:
        self._model, self._width, self._height, self._view = model, width, height, view
        self._camera: Any = None
        self._renderer: Any = None

    def picture(self, data: Any) -> np.ndarray:
        """Return a picture of the state in `data`, uint8 `[height, width, 3]`.

        Raises:
            DipoleError: There is no working graphics library.
        """
        if self._renderer is None:
            mujoco = import_mujoco()
            fast_render(self._model, self._width, self._height)
            try:
                self._renderer = mujoco.Renderer(self._model, self._height, self._width)
            except Exception as error:  # each graphics library fails with a type of its own
                raise DipoleError(
                    f"cannot render ({str(error).strip() or type(error).__name__}): {_HOW_TO_MEND}"
                ) from None
            self._camera = self._placed(mujoco)
            # A context still open when MuJoCo shuts EGL down makes noise; later registered means earlier called.
            atexit.register(self.close)
        self._renderer.update_scene(data, camera=self._camera)
        picture: np.ndarray = self._renderer.render().copy()
        return picture

    def _placed(self, mujoco: ModuleType) -> Any:
        if not isinstance(self._view, Mapping):
            return self._view
        camera = mujoco.MjvCamera()
        camera.lookat[:] = self._view["lookat"]
        camera.distance, camera.azimuth = self._view["distance"], self._view["azimuth"]
        camera.elevation = self._view["elevation"]
        return camera

    def close(self) -> None:
        """Free the graphics context. May be called twice."""
        if self._renderer is not None:
            atexit.unregister(self.close)
            self._renderer.close()
            self._renderer = None
