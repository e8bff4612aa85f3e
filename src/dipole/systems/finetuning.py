"""What the fine-tuning experiments share: a base trained on a micro environment's demonstrations, a run, its curve."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipole.data import Episodes, Windows
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.networks import MLPConfig, full_config
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.policies.config import ObjectiveConfig, ProcessConfig
from dipole.rl.finetune import finetune
from dipole.rl.methods import make_config as method_config
from dipole.rl.settings import FinetuneConfig
from dipole.systems.experiment import play, train
from dipole.systems.run import Run
from dipole.training import read_metrics
from dipole.training.config import TrainConfig

TWO_GOAL, SLOT_PEG, PENDULUM = "micro/two_goal", "micro/slot_peg", "micro/pendulum"
NETWORK = MLPConfig(width=128, num_blocks=3, context_width=64)
TRAINING: dict[str, Any] = {"steps": 1500, "batch_size": 128, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}
DEMONSTRATIONS = {TWO_GOAL: 200, SLOT_PEG: 50, PENDULUM: 20}
CHUNK = {TWO_GOAL: 4, SLOT_PEG: 16, PENDULUM: 1}


@lru_cache(maxsize=4)
def demonstrations(env: str, seed: int, count: int) -> Episodes:
    """Return demonstrations of a micro environment."""
    return collect(env, count, seed=COLLECT_SEED + 1000 * seed)


def base_policy(env: str, seed: int, sampler: SamplerConfig, process: str = "vp-cosine", scale: int = 1) -> Any:
    """Return a policy trained by imitation on `scale` times the usual demonstrations."""
    episodes = demonstrations(env, seed, scale * DEMONSTRATIONS[env])
    torch.manual_seed(seed)
    discrete = process != "flow"
    config = make_config(
        episodes,
        network=full_config(NETWORK),
        process=ProcessConfig(process, num_steps=100) if discrete else "flow",  # type: ignore[arg-type]
        objective=ObjectiveConfig("epsilon", "uniform") if discrete else None,
        sampler=sampler,
        obs_horizon=1,
        pred_horizon=CHUNK[env],
        action_horizon=CHUNK[env],
    )
    policy: DiffusionPolicy = make_policy(config, episodes)
    windows = Windows(episodes, list(config.observation), "action", 1, CHUNK[env], CHUNK[env])
    return train(policy, windows, TrainConfig(seed=seed, **TRAINING))


def success(policy: Any, env: str, episodes: int) -> float:
    """Return the success rate in a micro environment on the seeds of final evaluations."""
    return float(play(policy, env, episodes).column("success").mean())


def improve(
    policy: Any,
    env: str,
    method: str,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    judge: int | Callable[[Any], float],
    offline: Episodes | None = None,
    env_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune and return `success` of the last policy on fresh seeds, its `curve`, `seconds` and `env_steps`.

    The curve is of the environment's score: success, or the return where there is none.

    Args:
        policy: The base.
        env: Environment.
        method: Method.
        settings: Of the method.
        run: Fields of `FinetuneConfig`.
        judge: The final evaluation: episodes of `success`, or a function from a policy to its success.
        offline: Recorded experience.
        env_options: Options of the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        config = FinetuneConfig(**run)
        result = finetune(
            policy, env, method, method_config(method, settings), config, out, offline=offline, env_options=env_options
        )
        rows = read_metrics(out)
    curve = [[row["step"], row["eval/score"]] for row in rows if "eval/score" in row]
    return {
        "success": success(result.policy, env, judge) if isinstance(judge, int) else judge(result.policy),
        "curve": curve,
        "env_steps": result.env_steps,
        "seconds": result.seconds,
    }


def samples_to(curve: Sequence[Sequence[float]], level: float) -> float:
    """Return the env steps after which the success first is at `level`, between evaluations by a straight line.

    Infinite where it never is.
    """
    before = (curve[0][0], curve[0][1])
    for steps, value in curve:
        if value >= level:
            if value == before[1]:
                return float(steps)
            share = max(0.0, (level - before[1]) / (value - before[1]))
            return float(before[0] + share * (steps - before[0]))
        before = (steps, value)
    return float("inf")


def area(curve: Sequence[Sequence[float]]) -> float:
    """Return the mean success over the samples used: the area under the curve, divided by its width."""
    steps, values = np.array(curve, dtype=np.float64).T
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def plot_curves(run: Run, parts: Mapping[str, Sequence[Mapping[str, Any]]], score: str = "success") -> None:
    """Draw the score of every seed of every variant against env steps."""
    with run.plot(score) as axes:
        for colour, (variant, found) in enumerate(parts.items()):
            for k, part in enumerate(found):
                axes.plot(*np.array(part["curve"]).T, ".-", color=f"C{colour}", label=variant if k == 0 else None)
        axes.set_xlabel("env steps")
        axes.set_ylabel(score)
        axes.legend()
