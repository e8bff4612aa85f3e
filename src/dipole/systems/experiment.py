"""What the experiments share: a short training run, rollouts on fixed seeds, and numbers over seeds with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dipole.data import Episodes, Windows
from dipole.envs import make
from dipole.evaluation.episode import Rollouts
from dipole.evaluation.rollout import rollout
from dipole.evaluation.seeds import episode_seeds, first_seed
from dipole.systems.card import Measure
from dipole.training.batches import EpochOrder, Loader, Source
from dipole.training.config import TrainConfig
from dipole.training.update import Updater, make_accelerator

# Two-sided 95 % points of Student's t for 1..9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def train(policy: Any, source: Source, config: TrainConfig) -> Any:
    """Train `policy` for `config.steps` updates and return its average (EMA) in evaluation mode. Saves nothing.

    In fp32 unless the settings say bf16: what is measured to be faster here would make results depend on the machine.
    """
    if config.steps is None:
        raise ValueError("an experiment trains for a number of steps, so that all its policies get the same budget")
    accelerator = make_accelerator(replace(config, device="cpu"))  # where the experiments play
    updater = Updater(accelerator, policy, config, "bf16" if config.precision == "bf16" else "fp32")
    order = EpochOrder(len(source), config.batch_size, config.seed)
    batches = Loader(source, order, slice(0, config.batch_size), accelerator.device, stop=config.steps)
    for step, batch in enumerate(batches):
        updater.update(batch, step, config.steps)
    return updater.ema.module.eval()


def play(policy: Any, env_name: str, episodes: int, seed: int = 0, keep_trajectories: bool = False) -> Rollouts:
    """Return episodes of `policy` in a micro environment, all rows at once.

    Args:
        policy: The policy.
        env_name: Environment.
        episodes: Number of episodes.
        seed: Block of evaluation seeds; equal blocks mean equal episodes for every policy.
        keep_trajectories: Keep what was observed.
    """
    env = make(env_name, num_envs=episodes)
    try:
        seeds = episode_seeds(first_seed(seed), episodes)
        return rollout(policy, env, seeds, block=episodes, keep_trajectories=keep_trajectories)
    finally:
        env.close()


def observations(policy: Any, episodes: Episodes, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return observations of demonstrations, drawn at random, `[count, To, ...]`."""
    keys = list(policy.config.observation)
    windows = Windows(episodes, keys, "action", policy.obs_horizon, policy.pred_horizon, policy.action_horizon)
    batch = windows.batch(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    return {key: torch.from_numpy(batch[key]) for key in keys}


def over_seeds(values: Sequence[float], low: float = -math.inf, high: float = math.inf, unit: str = "") -> Measure:
    """Return the mean over training seeds with its 95 % t-interval, cut to the range the number can have."""
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return Measure(mean, unit=unit)
    half = _T[min(len(data) - 2, len(_T) - 1)] * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Measure(mean, max(low, mean - half), min(high, mean + half), unit)


def rate(values: Sequence[float]) -> Measure:
    """Return `over_seeds` for shares."""
    return over_seeds(values, 0.0, 1.0)


def listed(values: Sequence[float]) -> str:
    """Return the values of all seeds in words, for a note."""
    return "per seed " + ", ".join(f"{value:.3g}" for value in values)


def number_of_parameters(module: torch.nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
