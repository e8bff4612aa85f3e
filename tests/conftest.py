import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # Several test processes share the cores: two-thread small matrix products collapse under load.
    torch.set_num_threads(1)


os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
