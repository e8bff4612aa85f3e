"""Streaming Diffusion Policy: a chunk is carried on half denoised, and each call finishes only its first piece.

Source: Hoeg et al., "Streaming Diffusion Policy: Fast Policy Synthesis with Variable Noise Diffusion Models" (2024).
Tier `ci` checks the exact properties and streams a Gaussian process with its exact denoiser. Tier `small` trains on
`micro/fork2d` (does it cost success?) and on `micro/track2d` (does it react later, the more pieces there are?), and
sets it against DDIM with the same number of network calls, with the same kind of network and budget.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dipole.data import Windows
from dipole.envs import collect, make
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.latency import count_network_calls, measure_latency
from dipole.evaluation.seeds import first_seed
from dipole.networks import MLPConfig, full_config
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.policies.streaming import StreamingTraining
from dipole.realtime import Runtime, apply
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, over_seeds, play, rate, train
from dipole.systems.run import Run
from dipole.systems.sdp_checks import exact_checks, seam
from dipole.training.config import TrainConfig

CARD = Card(
    name="sdp",
    title="Streaming Diffusion Policy: a chunk carried on half denoised",
    source=Source("Streaming Diffusion Policy: Fast Policy Synthesis with Variable Noise Diffusion Models", 2024),
    axis="start and levels",
    summary=(
        "Trained with a noise level for every position of the chunk. At run time the later pieces of the chunk are "
        "kept partly denoised from call to call, so that a call costs N / h network calls instead of N."
    ),
    claim="h times fewer network calls per chunk at comparable success; reacts later as h grows.",
    spec_section="a5",
)

FORK, TRACK = "micro/fork2d", "micro/track2d"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 200
EPISODES = 100
LEVELS = 100
TO, TA = 2, 4
PIECES = (1, 2, 4)
# The levels of 20 positions are embedded side by side: narrowly, or that embedding would be most of the network.
NETWORK = MLPConfig(width=192, num_blocks=3, context_width=64, step_embed_dim=16, per_position_levels=True)
TRAINING: dict[str, Any] = {"steps": 4500, "batch_size": 64, "lr": 2e-3, "ema_decay": 0.998, "precision": "fp32"}
CONSTANT = StreamingTraining(chunk_wise=0.0, constant=1.0)
CALLS = 20

DDPM = SamplerConfig("ddpm", LEVELS, clip=1.0)


def ddim(steps: int) -> SamplerConfig:
    """Return DDIM with so many steps."""
    return SamplerConfig("ddim", steps, clip=1.0)


def trained(env: str, pred_horizon: int, scheme: StreamingTraining, seed: int) -> DiffusionPolicy:
    """Return a policy trained on demonstrations of `env`."""
    episodes = collect(env, DEMONSTRATIONS, seed=COLLECT_SEED + 1000 * seed)
    torch.manual_seed(seed)
    config = make_config(
        episodes,
        network=full_config(NETWORK),
        process="vp-cosine",
        sampler=DDPM,
        obs_horizon=TO,
        pred_horizon=pred_horizon,
        action_horizon=TA,
        streaming=scheme,
    )
    # Up to the last frame of a demonstration: with Ta = 4 of 20 the usual padding leaves out its last fifteen.
    windows = Windows(episodes, list(config.observation), "action", TO, pred_horizon, pred_horizon - TO + 1)
    policy: DiffusionPolicy = train(make_policy(config, episodes), windows, TrainConfig(seed=seed, **TRAINING))
    return policy


def streamed(policy: DiffusionPolicy, sampler: SamplerConfig = DDPM, **options: Any) -> Any:
    """Return the policy, streaming; the first buffer holds still, as actions are positions here."""
    return apply(policy, Runtime("streaming", {"primer": "constant", **options}, sampler))


def succeeded(policy: Any) -> float:
    """Return the success rate on `FORK`."""
    return float(play(policy, FORK, EPISODES).column("success").mean())


def reaction_error(policy: Any) -> float:
    """Return the mean distance to the goal over the ten steps after it jumped."""
    return -float(play(policy, TRACK, EPISODES).column("return_").mean())


def train_and_play(name: str, seed: int) -> dict[str, float]:
    """Train one of the policies compared and return its scores."""
    if name.startswith("track"):
        count = int(name.removeprefix("track"))
        policy = trained(TRACK, TO - 1 + TA * count, CONSTANT if count == 1 else StreamingTraining(), seed)
        if count > 1:
            return {"error": reaction_error(streamed(policy))}
        runs = {f"ddim{LEVELS // h}": ddim(LEVELS // h) for h in PIECES if h > 1}
        return {"error": reaction_error(policy)} | {
            key: reaction_error(policy.with_sampler(sampler)) for key, sampler in runs.items()
        }
    # 20 positions, as published: four pieces, and three positions left over at the end
    policy = trained(FORK, 20, CONSTANT if name == "constant" else StreamingTraining(), seed)
    if name == "constant":
        return {
            "ddpm": succeeded(policy),
            "ddim25": succeeded(policy.with_sampler(ddim(25))),
            "ddim5": succeeded(policy.with_sampler(ddim(5))),
            "streamed": succeeded(streamed(policy)),
        }
    return {
        "streamed": succeeded(streamed(policy)),
        "streamed5": succeeded(streamed(policy, ddim(20))),
        "clean_overlap": succeeded(streamed(policy, overlap_noise=False)),
        "zero": succeeded(streamed(policy, primer="zero")),
        "denoised": succeeded(streamed(policy, primer="denoise")),
        **costs(policy),
    }


def costs(policy: DiffusionPolicy) -> dict[str, float]:
    """Return network calls and milliseconds of a chunk, streaming and from noise, at batch 1 on one thread."""
    env = make(FORK)
    try:
        first = env.reset([0], [first_seed(0)])
    finally:
        env.close()
    obs = {key: torch.from_numpy(np.repeat(value[:, None], TO, axis=1)) for key, value in first.items()}
    found: dict[str, float] = {}
    for name, runner in (("streaming", streamed(policy)), ("plain", policy)):
        (latency,) = measure_latency(runner, obs, calls=CALLS, warmup=2, threads=[1])
        found |= {f"{name}_ms": latency.p50_ms, f"{name}_nfe": float(count_network_calls(runner, obs) or math.nan)}
    return found


def small(run: Run) -> list[Claim]:
    """Train the streaming policy, the ordinary one, and policies of one, two and four pieces."""
    names = ("streaming", "constant", *(f"track{h}" for h in PIECES))
    settings = {"network": full_config(NETWORK), "training": TRAINING, "episodes": [DEMONSTRATIONS, EPISODES, CALLS]}
    parts = run.grid(names, SEEDS, settings, train_and_play)

    def values(name: str, key: str) -> list[float]:
        return [part[key] for part in parts[name]]

    errors = {h: values(f"track{h}", "error") for h in PIECES}
    with run.plot("reaction") as axes:
        axes.errorbar(PIECES, [np.mean(errors[h]) for h in PIECES], [np.std(errors[h]) for h in PIECES], fmt="o-")
        axes.set_xlabel("pieces h (network calls per chunk: 100 / h)")
        axes.set_ylabel("distance to the goal after its jump")
    return [*_success(values), *_speed(values), *_reaction(values, errors)]


def _success(values: Any) -> list[Claim]:
    ours, full, equal = values("streaming", "streamed"), values("constant", "ddpm"), values("constant", "ddim25")
    few, few_ddim = values("streaming", "streamed5"), values("constant", "ddim5")
    ablation = values("constant", "streamed")
    return [
        Claim(
            "as good as DDPM with four times the calls",
            "within 0.03",
            rate(ours),
            rate(full),
            Margin("difference", low=-0.03),
            f"success on fork2d, 25 calls against 100; streaming {listed(ours)}; DDPM {listed(full)}",
        ),
        Claim(
            "better than DDIM at equal calls (25)",
            "",
            rate(ours),
            rate(equal),
            Margin("difference", low=0.0),
            f"success on fork2d; DDIM-25 of an ordinary policy of the same network {listed(equal)}",
        ),
        Claim(
            "better than DDIM at equal calls (5)",
            "",
            rate(few),
            rate(few_ddim),
            Margin("difference", low=0.0),
            f"streaming DDIM-20 in four pieces {listed(few)}; DDIM-5 {listed(few_ddim)}",
        ),
        Claim(
            "streaming needs training at levels per position",
            "falls by 0.2 (estimate)",
            rate(ablation),
            rate(ours),
            Margin("difference", high=-0.2),
            f"streaming a policy trained with one level for all positions: {listed(ablation)}",
        ),
        Claim(
            "the published code's clean overlap",
            "",
            rate(values("streaming", "clean_overlap")),
            rate(ours),
            None,
            "the past positions are not noised again (`overlap_noise=False`)",
        ),
        Claim(
            "a denoised first buffer",
            "no better than zeros",
            rate(values("streaming", "denoised")),
            rate(values("streaming", "zero")),
            None,
            "success; costs 100 more calls, once an episode. Baseline: a buffer of zeros, here the middle of the disc. "
            "All other rows: a buffer that holds still",
        ),
    ]


def _speed(values: Any) -> list[Claim]:
    calls = [values("streaming", f"{name}_nfe") for name in ("streaming", "plain")]
    times = [values("streaming", f"{name}_ms") for name in ("streaming", "plain")]
    return [
        Claim(
            "network calls per chunk",
            "N / h",
            Measure(calls[0][0]),
            Measure(calls[1][0]),
            Margin("ratio", low=0.25, high=0.25),
            "counted",
        ),
        Claim(
            "time per chunk",
            "4 x less",
            over_seeds(times[0], 0.0, unit="ms"),
            over_seeds(times[1], 0.0, unit="ms"),
            Margin("ratio", high=0.3),
            "median, batch 1, one thread; against DDPM-100 (DDIM-25 takes as long as streaming does)",
        ),
    ]


def _reaction(values: Any, errors: dict[int, list[float]]) -> list[Claim]:
    claims = [
        Claim(
            "reacts later with more pieces",
            "stated trade-off",
            over_seeds(errors[4], 0.0),
            over_seeds(errors[1], 0.0),
            Margin("difference", low=0.0),
            "mean distance to the goal in the ten steps after it jumped, h = 4 against 1; h = 2: "
            f"{np.mean(errors[2]):.3f}; {listed(errors[4])} against {listed(errors[1])}",
        )
    ]
    for h in PIECES[1:]:
        rival = values("track1", f"ddim{LEVELS // h}")
        claims.append(
            Claim(
                f"reacts as fast as DDIM at equal calls ({LEVELS // h})",
                "",
                over_seeds(errors[h], 0.0),
                over_seeds(rival, 0.0),
                Margin("difference", high=0.0),
                f"mean distance after the jump; DDIM-{LEVELS // h} begins every chunk anew: {listed(rival)}",
            )
        )
    return claims


def ci(run: Run) -> list[Claim]:
    """Check the exact properties; stream a Gaussian process."""
    kept, published = seam(True), seam(False)
    true = math.exp(-0.25)
    spread = Claim(
        "streams a known Gaussian process at its own spread",
        "1",
        Measure(kept["std"]),
        None,
        # 100 ancestral steps with the exact denoiser narrow it a little; of 7200 correlated numbers, error 0.02
        Margin(low=0.9, high=1.05),
        "standard deviation of the actions; exact denoiser, nothing observed",
    )
    inside = Claim(
        "neighbours inside a chunk",
        f"{true:.3f} in the data",
        Measure(kept["inside"]),
        None,
        Margin(low=true - 0.05, high=true + 0.05),
        "correlation",
    )
    across = Claim(
        "neighbours across the seam of two chunks",
        f"{true:.3f} in the data",
        Measure(kept["correlation"]),
        Measure(published["correlation"]),
        None,
        "correlation; baseline: the past positions left clean, as in the published code. The buffer alone does not "
        "hold chunks together as the data does: in a policy the observation has to",
    )
    return [*exact_checks(), spread, inside, across]


TIERS = {"ci": ci, "small": small}
