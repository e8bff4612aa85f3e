"""Imitation: train a policy on demonstrations.

episodes = dipole.data.load("runs/demos")
policy = make_policy(make_config(episodes, network="mlp"), episodes)
train(policy, episodes, TrainConfig(minutes=1), "runs/peg")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data import Episodes, Windows, split_episodes
from dipole.errors import DipoleError
from dipole.training.batches import Subset
from dipole.training.config import TrainConfig
from dipole.training.loop import fit
from dipole.training.record import fingerprint
from dipole.training.result import Evaluate, TrainResult


def train(
    policy: Any,
    episodes: Episodes,
    config: TrainConfig,
    out: str | Path,
    *,
    command: Mapping[str, Any] | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a policy on demonstrations; whole episodes are held out for validation. See `fit` for the arguments.

    Args:
        policy: A policy with `config.observation` and horizons, such as `DiffusionPolicy`.
        episodes: Demonstrations.
        config: Settings.
        out: Folder of the run.
        command: Kept in `train.json`.
        resume: Go on with that run.
        evaluate: Evaluation in an environment, called now and then.
        progress: Show a progress bar.

    Raises:
        DipoleError: The demonstrations do not suit the policy, or as for `fit`.
    """
    keys = list(policy.config.observation)
    check_demonstrations(policy, episodes, keys)
    ahead = policy.pred_horizon - policy.obs_horizon + 1
    streaming = getattr(policy.config, "streaming", None) is not None
    windows = Windows(
        episodes,
        keys,
        obs_horizon=policy.obs_horizon,
        pred_horizon=policy.pred_horizon,
        # A streaming chunk is much longer than Ta: padded for Ta alone, the ends of episodes would never be "now".
        action_horizon=ahead if streaming else policy.action_horizon,
    )
    source, held_out = split_windows(windows, config.val_fraction, config.seed)
    data = fingerprint(episodes, [*keys, "action"])
    options: dict[str, Any] = {"resume": resume, "evaluate": evaluate, "progress": progress}
    return fit(policy, source, held_out, config, out, data=data, command=command, **options)


def split_windows(windows: Windows, fraction: float, seed: int) -> tuple[Subset, Subset | None]:
    """Return the windows of the training episodes and those of the held-out ones (None for a single episode)."""
    episodes = windows.episodes
    if fraction == 0 or episodes.num_episodes == 1:
        return Subset(windows, np.arange(len(windows))), None
    _, held_out = split_episodes(episodes.num_episodes, fraction, seed)
    is_held_out = np.isin(np.searchsorted(episodes.ends, windows.frames, side="right"), held_out)
    return Subset(windows, np.flatnonzero(~is_held_out)), Subset(windows, np.flatnonzero(is_held_out))


def check_demonstrations(policy: Any, episodes: Episodes, keys: list[str]) -> None:
    """Raise DipoleError when the demonstrations cannot train the policy: features, NaN, short episodes."""
    wanted = {**policy.config.observation, "action": policy.config.action}
    for key, feature in wanted.items():
        found = episodes.feature(key)
        if tuple(found.shape) != tuple(feature.shape):
            raise DipoleError(
                f"'{key}' has shape {list(found.shape)} in the dataset, {list(feature.shape)} in the policy: train a "
                "new policy for this dataset"
            )
    for key in wanted:
        _check_finite(key, episodes)
    shortest = int(np.argmin(episodes.lengths))
    if episodes.lengths[shortest] < policy.pred_horizon:
        raise DipoleError(
            f"episode {shortest} has {episodes.lengths[shortest]} frames, fewer than the prediction horizon "
            f"{policy.pred_horizon}: lower pred_horizon, or leave short episodes out"
        )


def _check_finite(key: str, episodes: Episodes) -> None:
    column = episodes.columns[key]
    if column.dtype.kind != "f":
        return
    bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
    if bad.any():
        frame = int(np.argmax(bad))
        episode = int(np.searchsorted(episodes.ends, frame, side="right"))
        raise DipoleError(
            f"'{key}' is not finite in {int(bad.sum())} frames, first in episode {episode} at frame "
            f"{frame - int(episodes.starts[episode])}: look at them with `dipole inspect`"
        )
