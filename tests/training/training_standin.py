"""A policy small enough to be trained thousands of times in a test, its data, and a script that trains it.

Run as a script (`python training_standin.py OUT [key=value ...]`) it trains in a process of its own, which a test may
kill, limit, or launch several times.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.multiprocessing import start_processes

from dipole.data import Episodes, Feature, Normalizer
from dipole.diffusion import DenoisingObjective, Flow, LogitNormal
from dipole.errors import DipoleError
from dipole.training import TrainConfig, train

STATE, ACTION = 3, 2


@dataclass(frozen=True)
class StandInConfig:
    observation: dict[str, Feature] = field(default_factory=lambda: {"observation.state": Feature("float32", (STATE,))})
    action: Feature = field(default_factory=lambda: Feature("float32", (ACTION,)))
    obs_horizon: int = 2
    pred_horizon: int = 8
    action_horizon: int = 4
    width: int = 16
    dropout: float = 0.0
    mask_padding: bool = False

    @property
    def objective(self) -> SimpleNamespace:
        return SimpleNamespace(mask_padding=self.mask_padding)


class StandInPolicy(nn.Module):
    """Normalise, one hidden layer, the real objective."""

    type_name = "diffusion"

    def __init__(self, config: StandInConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.config, self.normalizer = config, normalizer
        inputs = config.pred_horizon * ACTION + config.obs_horizon * STATE + 1
        self.layers = nn.Sequential(
            nn.Linear(inputs, config.width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.pred_horizon * ACTION),
        )
        self.objective = DenoisingObjective(Flow(), "velocity", LogitNormal())
        for name in ("obs_horizon", "pred_horizon", "action_horizon"):
            setattr(self, name, getattr(config, name))

    def network(self, x, time, cond):
        flat = torch.cat([x.flatten(1), cond.flatten(1), time[:, None] / 1000], dim=1)
        return self.layers(flat).view_as(x)

    def loss(self, batch, generator=None):
        x0 = self.normalizer.normalize("action", batch["action"])
        cond = self.normalizer.normalize("observation.state", batch["observation.state"])
        mask = ~batch["action_is_pad"].unsqueeze(-1) if self.config.mask_padding else None
        return self.objective(self.network, x0, cond, generator=generator, mask=mask)

    def forward(self, batch, generator=None):
        return self.loss(batch, generator)


def make_episodes(count: int = 6, length: int = 30, seed: int = 0) -> Episodes:
    """Random walks, and actions that are a function of them: there is something to learn."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(STATE, ACTION))
    made = []
    for number in range(count):
        state = rng.normal(size=(length + number, STATE)).cumsum(0).astype(np.float32)
        made.append({"observation.state": state, "action": np.tanh(state @ mixing).astype(np.float32)})
    return Episodes.from_list(made, fps=10.0)


def make_standin(episodes: Episodes, seed: int = 0, **options) -> StandInPolicy:
    torch.manual_seed(seed)
    config = replace(StandInConfig(), **options)
    modes = {"observation.state": "min_max", "action": "min_max"}
    normalizer = Normalizer.fit(episodes.stats(), modes)
    return StandInPolicy(config, normalizer)


def main(out: str, *words: str) -> None:
    options = {key: json.loads(value) for key, value in (word.split("=", 1) for word in words)}
    processes = options.pop("processes", 0)
    if processes:  # forked after the imports, which take longer than the training
        start_processes(_worker, (processes, out, options), nprocs=processes, start_method="fork")
    else:
        run(out, options)


def _worker(rank: int, processes: int, out: str, options: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    run(out, options)


def run(out: str, options: dict) -> None:
    policy_options = {key: options.pop(key) for key in ("dropout", "mask_padding", "width") if key in options}
    resume = options.pop("resume", False)
    episodes = make_episodes()
    settings = {"batch_size": 16, "precision": "fp32", "num_threads": 1, "log_every": 5, "device": "cpu"}
    try:
        train(make_standin(episodes, **policy_options), episodes, TrainConfig(**settings | options), out, resume=resume)
    except DipoleError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
