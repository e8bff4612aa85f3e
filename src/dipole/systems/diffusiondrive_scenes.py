"""The scenes of `micro/lanes` that planners learn from and are judged in, and the judgement."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dipole.data import Windows
from dipole.data.poses import headings
from dipole.envs import collect, make
from dipole.envs.experts.expert import expert_rng
from dipole.envs.micro.lanes import CAR, DT, EGO, LanesExpert, hits, legal_paths, off_road
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.driving import Drive, diversity, driving_score
from dipole.evaluation.seeds import episode_seeds, first_seed
from dipole.training.batches import Subset

ENV = "micro/lanes"
FEATURES = ("observation.state", "observation.scene")
DIVERSITY_SCENES = 50


class Scenes(NamedTuple):
    """Held-out scenes.

    Attributes:
        obs: Observations, each `[N, 1, ...]`.
        demonstrated: `[N, 8, 2]` what the demonstrator did.
        legal: `[N, 4, 8, 2]` all manoeuvres at the scene's speed, NaN for those that are not legal.
        obstacles: `[N, 2, 2]` centres.
        lanes: `[N, 3]` which lanes there are.
        speed: `[N]` m/s.
    """

    obs: dict[str, Tensor]
    demonstrated: np.ndarray
    legal: np.ndarray
    obstacles: np.ndarray
    lanes: np.ndarray
    speed: np.ndarray


@lru_cache(maxsize=1)
def training_data(seed: int, count: int) -> tuple[Windows, Subset]:
    """Return the windows of demonstrations, and those that start where a plan is made: at an episode's first frame."""
    episodes = collect(ENV, count, seed=COLLECT_SEED + 10_000 * seed)
    windows = Windows(episodes, FEATURES, "action", 1, 8, 8)
    return windows, Subset(windows, np.flatnonzero(np.isin(windows.frames, episodes.starts)))


@lru_cache(maxsize=1)
def held_out(count: int) -> Scenes:
    """Return the scenes that plans are judged in."""
    env = make(ENV, count)
    seeds = episode_seeds(first_seed(0), count)
    obs = env.reset(range(count), seeds)
    state = env.state(range(count))  # type: ignore[attr-defined]
    rows = [{key: value[k] for key, value in state.items()} for k in range(count)]
    expert = LanesExpert()
    demonstrated = [expert.plan(expert_rng(s), row)["path"] for s, row in zip(seeds, rows, strict=True)]
    legal = []
    for row in rows:
        paths, fine = legal_paths(row["lanes"], row["obstacles"], float(row["speed"]))
        legal.append(np.where(fine[:, None, None], paths, np.nan))
    tensors = {key: torch.from_numpy(obs[key])[:, None] for key in FEATURES}
    arrays = (np.stack(demonstrated), np.stack(legal), state["obstacles"], state["lanes"], state["speed"])
    return Scenes(tensors, *arrays)


def judge(paths: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """Return mean numbers of one plan `[N, 8, 2]` per scene."""
    full = np.concatenate([np.zeros((len(paths), 1, 2)), paths], axis=1)
    angle = headings(torch.from_numpy(full[:, 1:])).numpy()
    poses = np.concatenate([full, np.concatenate([np.zeros((len(paths), 1)), angle], 1)[..., None]], axis=-1)
    outside = off_road(full, scenes.lanes)
    size = np.broadcast_to(np.array([0.0, *CAR]), (*scenes.obstacles.shape[:-1], 3))
    boxes = np.concatenate([scenes.obstacles, size], axis=-1)
    reach = np.linalg.norm(np.diff(scenes.legal, axis=2), axis=-1).sum(-1) + scenes.legal[:, :, 0, 0]
    drive = Drive(
        poses,
        np.broadcast_to(boxes[:, None], (len(boxes), poses.shape[1], *boxes.shape[1:])),
        (float(EGO[0]), float(EGO[1])),
        DT,
        scenes.speed,
        outside,
        np.nanmax(reach, axis=1),
    )
    to_legal = np.linalg.norm(paths[:, None] - scenes.legal, axis=-1).mean(-1)
    scores = {name: float(value.mean()) for name, value in driving_score(drive).items()}
    return {
        **scores,
        "ade": float(np.linalg.norm(paths - scenes.demonstrated, axis=-1).mean()),
        "to_legal": float(np.nanmin(to_legal, axis=1).mean()),
        "collision": float(hits(full, scenes.obstacles).mean()),
        "off_road": float(outside.mean()),
    }


def spread(candidates: np.ndarray) -> float:
    """Return the mean diversity of the candidates `[N, K, 8, 2]` of some scenes."""
    return float(np.mean([diversity(paths) for paths in candidates[:DIVERSITY_SCENES]]))
