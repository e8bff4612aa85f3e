"""Policies made to be served in tests: what they answer shows whose observation, whose state and whose noise it was."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import randn
from dipole.policies import DiffusionPolicy, PolicyConfig, save_policy
from dipole.policies.policy import reset_rows

pytest.importorskip("websockets")
pytest.importorskip("msgpack")

STATE = "observation.state"


class EchoPolicy:
    """Actions `[B, 3, 4]`: the newest observation (2 components), the session's call count, its noise."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 2, 4, 3, 4

    def __init__(self, sleep=0.0, offset=0.0):
        vector = Feature("float32", (2,))
        self.config = SimpleNamespace(
            observation={STATE: vector}, action=Feature("float32", (4,)), fps=10.0, task="echo"
        )
        self.sleep, self.offset = sleep, offset
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def initial_state(self, batch):
        return {"count": torch.zeros(batch, dtype=torch.long), "sum": torch.zeros(batch, 2)}

    def reset(self, state, mask):
        return reset_rows(state, self.initial_state(len(mask)), mask)

    def act(self, obs, state, noise=None, generator=None):
        self.gate.wait(20)
        value = obs[STATE]
        self.batches.append(len(value))
        time.sleep(self.sleep)
        state = {"count": state["count"] + 1, "sum": state["sum"] + value[:, -1]}
        drawn = randn((len(value), 1), generator)
        step = torch.cat([value[:, -1] + self.offset, state["count"][:, None].float(), drawn], dim=1)
        return torch.stack([step, step + value[:, :1, :1].squeeze(1), step], dim=1), state


class ImagePolicy(EchoPolicy):
    """Sees an image as well; the actions are its mean by channel, and the first component of the state."""

    def __init__(self, height=16, width=20):
        super().__init__()
        self.config.observation["observation.images.top"] = Feature("image", (height, width, 3))

    def act(self, obs, state, noise=None, generator=None):
        image = obs["observation.images.top"]
        if image.dtype == torch.uint8:
            image = image.permute(0, 1, 4, 2, 3).float() / 255
        means = image[:, -1].mean(dim=(2, 3))
        step = torch.cat([means, obs[STATE][:, -1, :1]], dim=1)
        return step[:, None].repeat(1, 3, 1), state


class BadPolicy(EchoPolicy):
    """Gives NaN for a negative observation, and fails for one above 100."""

    def act(self, obs, state, noise=None, generator=None):
        chunk, state = super().act(obs, state, noise, generator)
        if bool((obs[STATE] > 100).any()):
            raise RuntimeError("secret detail /home/robot/secret.py")
        bad = (obs[STATE][:, -1, 0] < 0)[:, None, None]
        return torch.where(bad, torch.nan, chunk), state


def real_policy(seed=0, width=24):
    """Return an untrained diffusion policy."""
    vector = Feature("float32", (2,))
    network = {"name": "mlp", "width": width, "num_blocks": 1}
    config = PolicyConfig({STATE: vector}, vector, 2, 8, 4, network=network)
    stats = {"min": np.full(2, -1.5, np.float32), "max": np.full(2, 1.5, np.float32)}
    keys = (STATE, "action")
    torch.manual_seed(seed)
    return DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(keys, stats), dict.fromkeys(keys, "min_max")))


def save_real(path, seed=0):
    return save_policy(real_policy(seed), path)


def vector(*values):
    return {STATE: np.array(values, np.float32)}
