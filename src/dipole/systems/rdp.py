"""RDP: a slow diffusion policy over latents and a fast decoder that feels, against policies that feel when they plan.

Source: Xue et al., "Reactive Diffusion Policy: Slow-Fast Visual-Tactile Policy Learning for Contact-Rich Manipulation"
(RSS 2025). Tier `ci` checks what holds for any weights. Tier `small` wipes an uneven surface that shifts once
(`micro/wipe`): the share of ticks with the right force is told apart before and after the shift. All policies see the
same observations, force included, and plan at the same ticks, when a late look at the surface arrives.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from dipole.data import Episodes, Windows
from dipole.data.fast_windows import FastWindows
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.networks.action_codec import CodecConfig
from dipole.policies import SamplerConfig
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.policies.make import make_config, make_policy
from dipole.policies.rdp import RdpPolicy, make_rdp
from dipole.realtime.ensemble import EnsembleConfig, EnsemblePolicy
from dipole.serialization import to_dict
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, over_seeds, play, rate, train
from dipole.systems.rdp_baselines import Chunked, with_action_horizon
from dipole.systems.rdp_checks import exact_checks
from dipole.systems.rdp_scores import FORCE, band, shares
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="rdp",
    title="RDP: slow latent diffusion, fast reactive decoding of force",
    source=Source(
        "Reactive Diffusion Policy: Slow-Fast Visual-Tactile Policy Learning for Contact-Rich Manipulation",
        2025,
        "2503.02881",
    ),
    axis="decoding",
    summary=(
        "A codec compresses action chunks to a few latent tokens and decodes them tick by tick together with the force "
        "felt; a diffusion policy plans latents at a few hertz. Plans keep their consistency, and contact is answered "
        "within a tick."
    ),
    claim="After a disturbance in contact the right force is kept, where chunked policies lose it.",
    spec_section="a8",
)

ENV = "micro/wipe"
STATE = "observation.state"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 200
EPISODES = {ENV: 100, "contact/Wipe": 40}  # the second is a simulator
OBS_HORIZON, HORIZON, PERIOD, OFFSET = 4, 32, 16, 4
NETWORK: dict[str, Any] = {"name": "mlp", "width": 256, "num_blocks": 3}
CODEC = CodecConfig(width=8)
SAMPLER = SamplerConfig("ddim", 8, clip=1.0)
TRAINING: dict[str, Any] = {"batch_size": 64, "lr": 1e-3, "ema_decay": 0.99, "precision": "fp32"}
CODEC_STEPS, STEPS = 2000, 1500
CALLS = 40


@lru_cache(maxsize=1)
def demonstrations(env: str, seed: int, count: int) -> Episodes:
    """Return demonstrations with the shifts that evaluation has too."""
    return collect(env, count, seed=COLLECT_SEED + 10_000 * seed)


def train_rdp(env: str, seed: int, decoder: Any, options: dict[str, Any]) -> RdpPolicy:
    """Train codec and slow policy."""
    episodes = demonstrations(env, seed, DEMONSTRATIONS)
    windows = FastWindows(episodes, (STATE, FORCE), (FORCE,), OBS_HORIZON, HORIZON, PERIOD)
    policy = make_rdp(
        windows,
        seed=seed,
        network=NETWORK,
        codec=replace(CODEC, decoder=decoder),
        sampler=SAMPLER,
        offset=OFFSET,
        latency=0,  # the environment itself is late
        **options,
    )
    # As published, no average of weights in the first stage.
    policy = train(policy, windows, TrainConfig(seed=seed, steps=CODEC_STEPS, **{**TRAINING, "ema_decay": 0.0}))
    policy.begin_latents(windows, seed)
    trained: RdpPolicy = train(policy, windows, TrainConfig(seed=seed, steps=STEPS, **TRAINING))
    return trained


def train_dp(env: str, seed: int) -> DiffusionPolicy:
    """Train a diffusion policy that sees the force, for as many updates as both stages of RDP together."""
    episodes = demonstrations(env, seed, DEMONSTRATIONS)
    config = make_config(
        episodes,
        network=NETWORK,
        process="vp-cosine",
        sampler=SAMPLER,
        observation=(STATE, FORCE),
        obs_horizon=OBS_HORIZON,
        pred_horizon=OBS_HORIZON + PERIOD,
        action_horizon=PERIOD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = make_policy(config, episodes)
    windows = Windows(episodes, (STATE, FORCE), "action", OBS_HORIZON, config.pred_horizon, PERIOD)
    trained: DiffusionPolicy = train(policy, windows, TrainConfig(seed=seed, steps=CODEC_STEPS + STEPS, **TRAINING))
    return trained


def judge(policy: Any, env: str) -> dict[str, float]:
    """Return the scores of a policy in held-out episodes."""
    return shares(play(policy, env, EPISODES[env], keep_trajectories=True), env)


def run_rdp(env: str, seed: int, decoder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train and play RDP with or without force in its decoder."""
    policy = train_rdp(env, seed, decoder, options)
    return judge(policy, env) | {"ms": milliseconds(policy)}


def train_and_play(env: str, options: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """Return the scores of `rdp`, of it without force in its decoder (`symmetric`), or of diffusion policies (`dp`)."""
    if name == "dp":
        return run_dp(env, seed)
    return run_rdp(env, seed, "asymmetric" if name == "rdp" else name, options)


def run_dp(env: str, seed: int) -> dict[str, dict[str, float]]:
    """Train the diffusion policy and play it with three ways of carrying out its chunks."""
    policy = train_dp(env, seed)
    runs = {
        "chunk 16": Chunked(policy, PERIOD, OFFSET),
        "chunk 2": Chunked(policy, 2),
        "ensembling": EnsemblePolicy(with_action_horizon(policy, 1), EnsembleConfig()),
    }
    return {name: judge(runner, env) for name, runner in runs.items()}


def milliseconds(policy: RdpPolicy) -> dict[str, float]:
    """Return median times of a tick that plans and of one that does not; batch 1, one thread."""
    obs = {key: torch.zeros(1, OBS_HORIZON, *f.shape) for key, f in policy.config.observation.items()}
    times: dict[str, list[float]] = {"slow": [], "fast": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(CALLS):
            state = policy.initial_state(1)
            for name in ("slow", "fast", "fast"):
                began = time.perf_counter()
                _, state = policy.act(obs, state, generator=torch.Generator().manual_seed(0))
                times[name].append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values)) for name, values in times.items()}


def small(run: Run, env: str = ENV, options: dict[str, Any] | None = None) -> list[Claim]:
    """Train RDP with and without force in its decoder, and a diffusion policy, on all seeds."""
    options = options or {}
    config = {
        "env": [env, DEMONSTRATIONS, EPISODES[env]],
        "network": NETWORK,
        "codec": to_dict(CODEC),
        "training": [TRAINING, CODEC_STEPS, STEPS],
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
    }

    parts = run.grid(("rdp", "symmetric", "dp"), SEEDS, config, partial(train_and_play, env, options))
    found = {"RDP": parts["rdp"], "symmetric": parts["symmetric"]}
    found |= {name: [part[name] for part in parts["dp"]] for name in parts["dp"][0]}
    expert = run.part("expert", {"env": config["env"]}, partial(expert_shares, env))
    _plot(run, found)
    return [*_claims(found), *_reported(found, expert)]


def expert_shares(env: str) -> dict[str, float]:
    """Return the demonstrator's own scores, which bound what imitation can reach."""
    episodes = demonstrations(env, 0, DEMONSTRATIONS)
    low, high = band(env)
    force = episodes.columns[FORCE][:, 0]
    return {"all": float(((force >= low) & (force <= high)).mean())}


def _claims(found: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    def measure(name: str, when: str) -> Measure:
        return rate([part[when] for part in found[name]])

    def note(name: str, when: str) -> str:
        return f"share of ticks with the right force; {listed([part[when] for part in found[name]])}"

    after = measure("RDP", "after")
    rows = [
        Claim("after the shift, RDP keeps the force", ".80-.88", after, None, Margin(low=0.8), note("RDP", "after")),
        Claim(
            "after the shift, chunks of 16 lose it",
            ".19-.25",
            measure("chunk 16", "after"),
            None,
            Margin(high=0.5),
            note("chunk 16", "after"),
        ),
        Claim(
            "without force the decoder is no better than chunks",
            ".58 against .95 with force",
            measure("symmetric", "after"),
            measure("chunk 16", "after"),
            Margin("difference", low=-0.15, high=0.15),
            note("symmetric", "after"),
        ),
        Claim(
            "before the shift, chunks are nearly as good",
            ".75 against .95",
            measure("chunk 16", "before"),
            measure("RDP", "before"),
            Margin("difference", low=-0.15),
            note("chunk 16", "before"),
        ),
    ]
    rows += [
        Claim(
            f"after the shift, RDP is ahead of {text}",
            paper,
            after,
            measure(name, "after"),
            Margin("difference", low=0.0),
            f"baseline {listed([part['after'] for part in found[name]])}",
        )
        for name, text, paper in (
            ("chunk 2", "planning every two ticks, though that costs nothing here", ".50 against .10"),
            ("ensembling", "temporal ensembling", ".50 against .00-.15"),
        )
    ]
    return rows


def _reported(found: dict[str, list[dict[str, Any]]], expert: dict[str, float]) -> list[Claim]:
    before = [
        Claim(f"before the shift, {name}", "", rate([part["before"] for part in parts]))
        for name, parts in found.items()
        if name != "chunk 16"
    ]
    times = [part["ms"] for part in found["RDP"]]
    return [
        *before,
        Claim("the demonstrator, all ticks", "", Measure(expert["all"])),
        Claim(
            "time of a tick that only decodes",
            "<1 against 100 ms",
            over_seeds([t["fast"] for t in times], 0.0, unit="ms"),
            over_seeds([t["slow"] for t in times], 0.0, unit="ms"),
            None,
            "baseline: a tick that plans; batch 1, one thread",
        ),
    ]


def _plot(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    with run.plot("force") as axes:
        for offset, when in ((-0.2, "before"), (0.2, "after")):
            heights = [float(np.mean([part[when] for part in parts])) for parts in found.values()]
            axes.bar(np.arange(len(found)) + offset, heights, 0.4, label=f"{when} the shift")
        axes.set_xticks(np.arange(len(found)), list(found))
        axes.set_ylabel("share of ticks with the right force")
        axes.legend()


def ci(run: Run) -> list[Claim]:
    """Check what holds for any weights."""
    return exact_checks()


TIERS = {"ci": ci, "small": small}
