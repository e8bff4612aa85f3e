"""From a dataset to a policy: choose features and defaults, fit the normalizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dipole import networks
from dipole.data import Episodes, Normalizer
from dipole.data.features import Feature
from dipole.errors import DipoleError, unknown
from dipole.policies.config import (
    ObjectiveConfig,
    PolicyConfig,
    ProcessConfig,
    SamplerConfig,
    default_objective,
    default_sampler,
)
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.policies.streaming import StreamingTraining, num_pieces, pieces, rungs


def make_config(
    episodes: Episodes,
    *,
    network: str | dict[str, Any] = "mlp",
    vision: str | dict[str, Any] | None = None,
    process: str | ProcessConfig = "flow",
    objective: ObjectiveConfig | None = None,
    sampler: SamplerConfig | None = None,
    observation: Sequence[str] | None = None,
    obs_horizon: int = 2,
    pred_horizon: int = 16,
    action_horizon: int = 8,
    streaming: StreamingTraining | None = None,
) -> PolicyConfig:
    """Return the configuration of a policy for a dataset.

    Args:
        episodes: Demonstrations.
        network: Name of a network, or its configuration.
        vision: Name of an image encoder, or its configuration; needed only with images (default: the small CNN).
        process: Name of a process, or its configuration.
        objective: Default: the process's usual one.
        sampler: Default: the process's usual one.
        observation: Features to see; default: all `observation.*` that are vectors or images.
        obs_horizon: To.
        pred_horizon: Tp.
        action_horizon: Ta.
        streaming: Train for streaming: a noise level for every position (the network is made to take them), and a
            sampler whose steps the pieces of a chunk divide.

    Raises:
        DipoleError: A name is unknown, a feature is missing, or the horizons do not fit together.
    """
    features = _observation(episodes, observation)
    process_config = ProcessConfig(process) if isinstance(process, str) else process  # type: ignore[arg-type]
    process_config.build()  # an unknown name is reported here, before anything is trained
    table = networks.full_config(network)
    if streaming is not None:
        if "per_position_levels" in table:
            table["per_position_levels"] = True
        horizons = (obs_horizon, pred_horizon, action_horizon)
        sampler = streaming_sampler(process_config, horizons) if sampler is None else sampler
    has_images = any(feature.dtype in ("image", "video") for feature in features.values())
    return PolicyConfig(
        observation=features,
        action=_action(episodes),
        obs_horizon=obs_horizon,
        pred_horizon=pred_horizon,
        action_horizon=action_horizon,
        network=table,
        vision=networks.full_vision_config(vision or "small-cnn") if has_images else None,
        process=process_config,
        objective=objective or default_objective(process_config),
        sampler=sampler or default_sampler(process_config),
        fps=episodes.fps,
        task=episodes.tasks[0] if len(episodes.tasks) == 1 else "",
        streaming=streaming,
    )


def streaming_sampler(process: ProcessConfig, horizons: tuple[int, int, int]) -> SamplerConfig:
    """Return the published sampler of a streaming policy, DDPM over all levels; for other processes a short ODE.

    Args:
        process: The process.
        horizons: To, Tp, Ta.

    Raises:
        DipoleError: The chunk has one piece, so that streaming gains nothing, or they do not divide the levels.
    """
    count = num_pieces(*horizons)
    if count < 2:
        to, tp, ta = horizons
        raise DipoleError(
            f"streaming cuts a chunk of Tp={tp} into {count} piece of Ta={ta}, which gains nothing: raise pred_horizon "
            f"to {to - 1 + 2 * ta} or more, or lower action_horizon"
        )
    if not process.name.startswith("vp") or "continuous" in process.name:
        return replace(default_sampler(process), name="euler", num_steps=-(-10 // count) * count)
    rungs(pieces(*horizons), count, process.build())  # raises where they do not divide
    return SamplerConfig("ddpm", process.num_steps, clip=1.0)


def _observation(episodes: Episodes, wanted: Sequence[str] | None) -> dict[str, Feature]:
    seen = {key: feature for key, feature in episodes.features.items() if key.startswith("observation.")}
    if wanted is not None:
        for key in wanted:
            if key not in seen:
                raise unknown("observation feature", key, seen)
        return {key: seen[key] for key in wanted}
    usable = {key: f for key, f in seen.items() if f.dtype in ("image", "video") or len(f.shape) == 1}
    if not usable:
        raise DipoleError("the dataset has no 'observation.*' feature: rename its columns (see `dipole inspect`)")
    return usable


def _action(episodes: Episodes) -> Feature:
    if "action" not in episodes.features:
        raise DipoleError(f"the dataset has no feature 'action', only: {', '.join(episodes.features)}")
    return episodes.features["action"]


def fit_normalizer(config: PolicyConfig, episodes: Episodes) -> Normalizer:
    """Return the normalizer fitted on the demonstrations; with `min_max`, images go from [0, 1] to [-1, 1]."""
    stats = episodes.stats()
    modes = {key: config.normalization_mode(key) for key in [*config.observation, "action"]}
    for key in config.images:
        if modes[key] == "min_max":
            stats[key] = {**stats[key], "min": np.zeros_like(stats[key]["min"]), "max": np.ones_like(stats[key]["max"])}
    return Normalizer.fit(stats, modes)


def make_policy(config: PolicyConfig, episodes: Episodes) -> DiffusionPolicy:
    """Return a new policy with statistics from the demonstrations; weights come from torch's global seed."""
    return DiffusionPolicy(config, fit_normalizer(config, episodes))
