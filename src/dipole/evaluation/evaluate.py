"""Evaluating a policy: fixed unseen seeds, success with its interval, latency, videos, one JSON document.

What depends on the policy, the environment and the seeds is in `episodes` and the estimates, and is the same to the
digit in every repetition on one machine, whatever the number of environments; `fingerprint` is its digest. Wall-clock
measurements are kept apart in `timing`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dipole.envs.seeds import EVAL_SEED
from dipole.envs.spec import EnvSpec, Score, VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.describe import describe
from dipole.evaluation.episode import Episode, Rollouts
from dipole.evaluation.latency import count_network_calls, measure_latency
from dipole.evaluation.machine import machine, versions
from dipole.evaluation.rollout import Loop, first_observation, rollout
from dipole.evaluation.seeds import episode_seeds
from dipole.evaluation.statistics import Estimate, bootstrap, wilson
from dipole.evaluation.video import tile, write_mp4
from dipole.policies.policy import Policy
from dipole.serialization import from_dict, read_json, to_dict, write_json

FILE = "evaluation.json"
VIDEOS = "videos"
_MAX_FPS = 30.0  # of videos: faster control is thinned out


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        env: Name of the environment.
        task: What is to be done, in words.
        score_name: What the environment scores: `success`, `max_reward` or `return`.
        success: Success rate with Wilson's interval.
        score: Mean score with its bootstrap interval (that of `success` where success is the score).
        length: Mean number of environment steps with its bootstrap interval.
        episodes: Columns with one entry per episode: `seed`, `success`, `score`, `return`, `max_reward`, `length`,
            `terminated`, `truncated`, `chunks`; with a simulated delay also `execution.*`.
        fingerprint: Digest of environment, settings and `episodes`.
        settings: What decides the result besides policy, environment and seeds.
        policy: Which policy it was (see `describe`), with its counted `nfe`.
        timing: Wall-clock measurements.
        machine: What it ran on.
        versions: Of the libraries.
        videos: Files written, with seed and outcome of their episodes.
        notes: What could not be done, in words.
    """

    env: str
    task: str
    score_name: Score
    success: Estimate
    score: Estimate
    length: Estimate
    episodes: dict[str, Any]
    fingerprint: str
    settings: dict[str, Any]
    policy: dict[str, Any]
    timing: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    videos: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_episodes(self) -> int:
        """Return the number of episodes."""
        return len(self.episodes["seed"])

    def column(self, name: str) -> np.ndarray:
        """Return a column of the episodes, `[E]`."""
        return np.array(self.episodes[name])

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        values: dict[str, Any] = to_dict(self)
        return values

    def save(self, path: Path) -> None:
        """Write the JSON file, atomically."""
        write_json(path, self.to_json())


def load_evaluation(path: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Raises:
        DipoleError: The file is missing or something else.
    """
    return from_dict(Evaluation, read_json(path), where=str(path))


def evaluate(
    policy: Policy,
    env: str | VectorEnv,
    episodes: int = 50,
    seed: int = EVAL_SEED,
    *,
    num_envs: int = 16,
    block: int = 16,
    max_steps: int | None = None,
    stop_on_success: bool | None = None,
    env_options: Mapping[str, Any] | None = None,
    mode: Literal["sync", "async", "native"] | None = None,
    videos: int = 0,
    folder: Path | None = None,
    latency_calls: int = 50,
    confidence: float = 0.95,
    progress: Callable[[Episode], None] | None = None,
    delay: Loop | None = None,
) -> Evaluation:
    """Evaluate a policy on the episodes with seeds `seed, seed + 1, ...`.

    Args:
        policy: The policy.
        env: Name of an environment, or one that is made already (it is used, and not closed).
        episodes: How many.
        seed: The first episode's seed.
        num_envs: Environments run at once; does not change the result.
        block: Rows per call of the policy; may change the last digits (see `blocks`).
        max_steps: Longest episode; default the environment's.
        stop_on_success: Whether success ends an episode; default: if success is what the environment scores.
        env_options: Passed to `dipole.envs.make`.
        mode: How environments run at once (see `dipole.envs.make`).
        videos: Film this many episodes: the first ones, not the best.
        folder: Where the videos go (into `videos/`); needed for them.
        latency_calls: Chunks to time at batch 1; 0 for none.
        confidence: Coverage of the intervals.
        progress: Called with each finished episode.
        delay: Let chunks come late (see `dipole.realtime.delayed`); None: the world waits for the policy.

    Raises:
        DipoleError: Policy and environment do not fit, or an action or reward is not finite.
    """
    if videos and folder is None:
        raise ValueError("videos need a folder")
    seeds = episode_seeds(seed, episodes)
    with _environment(env, min(num_envs, episodes), mode, env_options or {}) as vector:
        runs = rollout(
            policy, vector, seeds, block=block, film=range(videos), max_steps=max_steps,
            stop_on_success=stop_on_success, progress=progress,
            runner=None if delay is None else delay.runner,
        )  # fmt: skip
        timing, nfe = _measure(policy, vector, runs, seeds[0], latency_calls)
        spec = vector.spec
    settings = {
        "first_seed": seed,
        "block": block,
        "max_steps": spec.max_steps if max_steps is None else max_steps,
        "max_steps_of_env": spec.max_steps,
        "stop_on_success": spec.score == "success" if stop_on_success is None else stop_on_success,
        "env_options": dict(env_options or {}),
        **({} if delay is None else {"delay": to_dict(delay)}),
    }
    files, notes = _write_videos(runs, spec, folder) if folder is not None and videos else ([], [])
    return Evaluation(
        **_found(runs, spec, settings, confidence),
        policy={**describe(policy), "nfe": nfe},
        timing=timing,
        machine=machine(),
        versions=versions(),
        videos=tuple(files),
        notes=(*runs.notes, *notes),
    )


def _found(runs: Rollouts, spec: EnvSpec, settings: dict[str, Any], confidence: float) -> dict[str, Any]:
    """Return the fields of an `Evaluation` that are the same in every repetition."""
    columns = _columns(runs, spec.score)
    success = wilson(sum(columns["success"]), len(columns["success"]), confidence)
    return {
        "env": spec.name,
        "task": spec.task,
        "score_name": spec.score,
        "success": success,
        "score": success if spec.score == "success" else bootstrap(np.array(columns["score"]), confidence),
        "length": bootstrap(np.array(columns["length"]), confidence),
        "episodes": columns,
        "fingerprint": _fingerprint(spec.name, settings, columns),
        "settings": settings,
    }


@contextmanager
def _environment(
    env: str | VectorEnv, num_envs: int, mode: Literal["sync", "async", "native"] | None, options: Mapping[str, Any]
) -> Iterator[VectorEnv]:
    if not isinstance(env, str):
        yield env
        return
    from dipole.envs import make

    vector = make(env, num_envs=num_envs, mode=mode, **options)
    try:
        yield vector
    finally:
        vector.close()


def _measure(
    policy: Policy, env: VectorEnv, runs: Rollouts, seed: int, calls: int
) -> tuple[dict[str, Any], int | None]:
    """Return the wall-clock measurements and the network calls per chunk."""
    steps = int(runs.column("length").sum())
    timing: dict[str, Any] = {
        "num_envs": env.num_envs,
        "wall_s": runs.wall_s,
        "env_steps_per_s": steps / runs.wall_s,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "latency": [],
    }
    obs = first_observation(policy, env, seed)
    if calls:
        timing["latency"] = [asdict(latency) for latency in measure_latency(policy, obs, calls=calls)]
    return timing, count_network_calls(policy, obs)


def _columns(runs: Rollouts, score: Score) -> dict[str, list[Any]]:
    names = {"return": "return_"}
    columns = {
        key: runs.column(names.get(key, key)).tolist()
        for key in ("seed", "success", "return", "max_reward", "length", "terminated", "truncated", "chunks")
    }
    for key in runs.episodes[0].execution:
        columns[key] = [episode.execution[key] for episode in runs.episodes]
    columns["score"] = [float(value) for value in columns[score]]
    if not np.isfinite(columns["return"]).all():
        bad = columns["seed"][int(np.argmin(np.isfinite(columns["return"])))]
        raise DipoleError(f"the environment gave a reward that is not finite in the episode with seed {bad}")
    return columns


def _fingerprint(env: str, settings: dict[str, Any], columns: dict[str, list[Any]]) -> str:
    text = json.dumps([env, settings, columns], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_videos(runs: Rollouts, spec: EnvSpec, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what was written, paths relative to `folder`, and what could not be."""
    filmed = [episode for episode in runs.episodes if episode.frames is not None]
    stride = max(1, round(spec.fps / _MAX_FPS))
    clips = [np.concatenate([e.frames[::stride], e.frames[-1:]]) for e in filmed if e.frames is not None]
    files: list[dict[str, Any]] = []
    try:
        for episode, clip in zip(filmed, clips, strict=True):
            name = f"{VIDEOS}/episode_{episode.index:03d}.mp4"
            write_mp4(folder / name, clip, spec.fps / stride)
            files.append({"file": name, "seed": episode.seed, "success": episode.success, "length": episode.length})
        if len(clips) > 1:
            grid = tile(clips, [episode.success for episode in filmed])
            write_mp4(folder / VIDEOS / "grid.mp4", grid, spec.fps / stride)
    except DipoleError as error:
        return files, [f"no videos: {error}"]
    return files, []
