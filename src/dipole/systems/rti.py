"""Real-time iteration: every tick goes on from the previous chunk and takes three denoising steps. No retraining.

Source: Duan et al., "Real-Time Iteration Scheme for Diffusion Policy" (2025). Tier `ci` checks the exact properties and
the table a start level is chosen from. Tier `small` trains ordinary Diffusion Policies: on `micro/track2d`, whose goal
jumps, for speed of reaction and jitter, and on `micro/grip2d`, whose gripper is binary, for what discrete actions need.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dipole.data import Episodes, Windows
from dipole.diffusion import VP
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.episode import Rollouts
from dipole.networks import MLPConfig, full_config
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.realtime import Runtime, apply
from dipole.realtime.rti import RTIConfig, residual, scale_discrete
from dipole.realtime.start_level import calibrate, fitted_std
from dipole.serialization import to_dict
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, over_seeds, play, rate, train
from dipole.systems.rti_checks import exact_checks
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="rti",
    title="Real-time iteration: a few steps from the previous chunk",
    source=Source("Real-Time Iteration Scheme for Diffusion Policy", 2025),
    axis="start and levels",
    summary=(
        "Works on any trained policy. The previous chunk, moved up by what was executed, takes the place of noise, and "
        "a short list of low levels that of the whole schedule, so that a new plan can be made at every tick."
    ),
    claim="Success of the full schedule with three calls per action; discrete actions need scaling.",
    spec_section="a6",
)

TRACK, GRIP = "micro/track2d", "micro/grip2d"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 200
EPISODES = 100
GRIPPER = (2,)
FACTOR = 10.0
CLIP_START = {"start_level": 18.0, "num_steps": 11}
STARTS = (2.0, 5.0, 10.0, 20.0, 40.0)
NETWORK = MLPConfig(width=192, num_blocks=3)
TRAINING: dict[str, Any] = {"steps": 2500, "batch_size": 128, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}

DDIM3 = SamplerConfig("ddim", 3, clip=1.0)


def demonstrations(env: str, seed: int) -> Episodes:
    """Return demonstrations of a task."""
    return collect(env, DEMONSTRATIONS, seed=COLLECT_SEED + 1000 * seed)


def trained(episodes: Episodes, seed: int, scaled: bool = False) -> DiffusionPolicy:
    """Return an ordinary Diffusion Policy, DDPM-100; `scaled`: with gripper actions of +-1/factor in its own units."""
    torch.manual_seed(seed)
    sampler = SamplerConfig("ddpm", 100, clip=1.0)
    config = make_config(episodes, network=full_config(NETWORK), process="vp-cosine", sampler=sampler)
    policy = make_policy(config, episodes)
    if scaled:
        policy.normalizer = scale_discrete(policy.normalizer, GRIPPER, FACTOR)
    # Up to the last frame of a demonstration: the usual padding, for Ta = 8, leaves out its last seven, where a policy
    # that plans at every tick is asked as well.
    windows = Windows(episodes, list(config.observation), "action", 2, 16, 15)
    found: DiffusionPolicy = train(policy, windows, TrainConfig(seed=seed, **TRAINING))
    return found


def every_tick(policy: DiffusionPolicy, sampler: SamplerConfig | None = None) -> Any:
    """Return the policy planning anew, from noise, before every action."""
    return apply(policy, Runtime(sampler=sampler, action_horizon=1))


def warm(policy: DiffusionPolicy, **options: Any) -> Any:
    """Return the policy going on from its previous chunk, at every tick."""
    return apply(policy, Runtime("rti", options, action_horizon=1))


def followed(policy: Any) -> dict[str, float]:
    """Return the distance to the goal in the ten steps after it jumped, and the jitter, on `TRACK`."""
    runs = play(policy, TRACK, EPISODES, keep_trajectories=True)
    return {"error": -float(runs.column("return_").mean()), "jitter": jitter(runs)}


def jitter(runs: Rollouts) -> float:
    """Return the root mean square of the second differences of the executed actions."""
    found = [np.diff(episode.trajectory.actions, n=2, axis=0) for episode in runs.episodes if episode.trajectory]
    return float(np.sqrt(np.mean(np.concatenate(found) ** 2)))


def gripped(policy: Any) -> float:
    """Return the success rate on `GRIP`."""
    return float(play(policy, GRIP, EPISODES).column("success").mean())


def train_and_play(name: str, seed: int) -> dict[str, Any]:
    """Train one of the policies and return the scores of every way to run it."""
    if name == "track":
        episodes = demonstrations(TRACK, seed)
        policy = trained(episodes, seed)
        found = calibrate(policy, episodes, RTIConfig())
        return {
            "ddpm-8": followed(policy),
            "ddpm-1": followed(every_tick(policy)),
            "ddim3-1": followed(every_tick(policy, DDIM3)),
            "rti": followed(warm(policy)),
            "relabelled": followed(warm(policy, levels=[3, 1, 0], relabel_skips=True)),
            **{f"start{start:g}": followed(warm(policy, start_level=start)) for start in STARTS},
            "calibrated": followed(warm(policy, **to_dict(found))),
            "level": found.start_level,
            "std": fitted_std(found.table, found, policy.process),
            "left": [[row.level, row.left] for row in found.table],
        }
    policy = trained(demonstrations(GRIP, seed), seed, scaled=name == "grip-scaled")
    full = {
        "ddpm": gripped(policy),
        "ddpm-1": gripped(every_tick(policy)),
        "ddim3-1": gripped(every_tick(policy, DDIM3)),
    }
    discrete = {"discrete": list(GRIPPER), "factor": FACTOR}
    if name == "grip-scaled":
        return full | {"rti": gripped(warm(policy, **discrete, discrete_mode="scale"))}
    return full | {
        "rti": gripped(warm(policy)),
        "clip": gripped(warm(policy, **discrete, discrete_mode="clip", **CLIP_START)),
        "start40": gripped(warm(policy, start_level=40.0)),
    }


def small(run: Run) -> list[Claim]:
    """Train on both tasks, and on the second with a scaled gripper, and run them in every way."""
    settings = {
        "network": full_config(NETWORK),
        "training": TRAINING,
        "episodes": [DEMONSTRATIONS, EPISODES],
        "runs": [STARTS, FACTOR],
    }
    parts = run.grid(("track", "grip", "grip-scaled"), SEEDS, settings, train_and_play)
    track = parts["track"]
    _plot(run, track)
    return [*_reaction(track), *_table(track), *_binary(parts)]


def _values(track: list[dict[str, Any]], name: str, score: str) -> list[float]:
    return [part[name][score] for part in track]


def _reaction(track: list[dict[str, Any]]) -> list[Claim]:
    def error(name: str) -> list[float]:
        return _values(track, name, "error")

    def shaking(name: str) -> list[float]:
        return _values(track, name, "jitter")

    metres = "mean distance to the goal in the ten steps after its jump"
    rms = "root mean square second difference of the actions"
    return [
        Claim(
            "reacts faster than whole chunks of the full schedule",
            "30 % (estimate)",
            over_seeds(error("rti"), 0.0),
            over_seeds(error("ddpm-8"), 0.0),
            Margin("ratio", high=0.7),
            f"{metres}; levels 2, 1, 0 every tick {listed(error('rti'))}; DDPM-100, Ta = 8, {listed(error('ddpm-8'))}",
        ),
        Claim(
            "smoother than the full schedule at every tick",
            "well below",
            over_seeds(shaking("rti"), 0.0),
            over_seeds(shaking("ddpm-1"), 0.0),
            Margin("ratio", high=0.5),
            f"{rms}; DDPM-100, Ta = 1",
        ),
        Claim("network calls per action", "3 against 100", Measure(3.0), Measure(100.0), Margin("ratio", high=0.03)),
        Claim(
            "reacts as fast as DDIM at equal calls (3 every tick)",
            "",
            over_seeds(error("rti"), 0.0),
            over_seeds(error("ddim3-1"), 0.0),
            Margin("difference", high=0.0),
            f"{metres}; DDIM-3, Ta = 1, {listed(error('ddim3-1'))}; DDPM-100, Ta = 1: {np.mean(error('ddpm-1')):.4f}",
        ),
        Claim(
            "smoother than DDIM at equal calls",
            "",
            over_seeds(shaking("rti"), 0.0),
            over_seeds(shaking("ddim3-1"), 0.0),
            Margin("ratio", high=1.0),
            f"{rms}; DDIM-3, Ta = 1, {listed(shaking('ddim3-1'))}",
        ),
    ]


def _table(track: list[dict[str, Any]]) -> list[Claim]:
    levels, stds = [part["level"] for part in track], [part["std"] for part in track]
    at_two = [dict(map(tuple, part["left"]))[2.0] for part in track]
    return [
        Claim(
            "start level by the measured table",
            "",
            over_seeds([part["calibrated"]["error"] for part in track], 0.0),
            over_seeds(_values(track, "rti", "error"), 0.0),
            None,
            f"distance after the jump; the lowest level that leaves at most 0.3 of an error is {listed(levels)}",
        ),
        Claim(
            "share of an error left by levels 2, 1, 0",
            "by the shape of the score",
            over_seeds(at_two, 0.0),
            over_seeds([_predicted(std) for std in stds], 0.0),
            None,
            f"measured on the policy; baseline: a Gaussian conditional fitted to the whole table, std {listed(stds)}",
        ),
        Claim(
            "the published relabelling of skipped levels (3, 1, 0)",
            "",
            over_seeds(_values(track, "relabelled", "error"), 0.0),
            over_seeds(_values(track, "rti", "error"), 0.0),
            None,
            "distance after the jump; baseline: levels 2, 1, 0",
        ),
    ]


def _predicted(std: float) -> float:
    return residual(VP.cosine(100), (2.0, 1.0, 0.0), std)


def _binary(parts: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    def success(name: str, key: str) -> list[float]:
        return [part[key] for part in parts[name]]

    plain, scaled, full = success("grip", "rti"), success("grip-scaled", "rti"), success("grip", "ddpm")
    equal = success("grip", "ddim3-1")
    return [
        Claim(
            "a binary action is out of reach of three low levels",
            "below 0.3 (estimate)",
            rate(plain),
            rate(full),
            Margin(high=0.3),
            f"success on grip2d, levels 2, 1, 0; {listed(plain)}; DDPM-100, Ta = 8, {listed(full)}",
        ),
        Claim(
            "scaling it by 10 and retraining recovers",
            "within 0.05 (estimate)",
            rate(scaled),
            rate(full),
            Margin("difference", low=-0.05),
            f"success, levels 2, 1, 0; {listed(scaled)}; the retrained policy with DDPM-100: "
            f"{np.mean(success('grip-scaled', 'ddpm')):.2f}",
        ),
        Claim(
            "better than DDIM at equal calls with a gripper",
            "",
            rate(scaled),
            rate(equal),
            Margin("difference", low=0.0),
            f"DDIM-3 of the ordinary policy, Ta = 1, {listed(equal)}; DDPM-100, Ta = 1: "
            f"{np.mean(success('grip', 'ddpm-1')):.2f}",
        ),
        Claim(
            "pulling the guess in, without retraining",
            "slightly worse than scaling",
            rate(success("grip", "clip")),
            rate(scaled),
            None,
            "`discrete_mode=clip`, eleven levels from 18, as published for Lift",
        ),
        Claim(
            "starting at level 40 instead, without retraining",
            "+-1 within reach",
            rate(success("grip", "start40")),
            rate(plain),
            None,
            "levels 40, 20, 0; baseline: 2, 1, 0",
        ),
    ]


def _plot(run: Run, track: list[dict[str, Any]]) -> None:
    with run.plot("start_level") as axes:
        for score, style in (("error", "o-"), ("jitter", "s--")):
            means = [np.mean(_values(track, f"start{start:g}", score)) for start in STARTS]
            axes.plot(STARTS, means, style, label="distance after the jump" if score == "error" else "jitter")
        axes.set_xlabel("start level of 100 (three calls)")
        axes.legend()
    with run.plot("table") as axes:
        for seed, part in zip(SEEDS, track, strict=True):
            axes.plot(*zip(*part["left"], strict=True), "o-", label=f"measured, seed {seed}")
        axes.axhline(0.3, color="grey", linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("start level of 100 (three calls)")
        axes.set_ylabel("share of an error left")
        axes.legend()


def ci(run: Run) -> list[Claim]:
    """Check the exact properties."""
    return exact_checks()


TIERS = {"ci": ci, "small": small}
