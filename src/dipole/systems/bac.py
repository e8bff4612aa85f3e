"""BAC: residual branches reused across the denoising steps of one call, against DDIM at equal network cost.

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy" (2025). Tier `ci` checks scheduler, union and
cache exactly. Tier `small` trains a transformer (three seeds) and a U-Net on `micro/fork2d` with 100 levels and samples
them cached and uncached from the same noise, and with DDIM in as many calls as the cached run costs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.data import Episodes, Windows
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.networks import TransformerConfig, UNet1DConfig, full_config
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.policies.config import ObjectiveConfig, ProcessConfig
from dipole.realtime.block_cache import BlockCachePolicy
from dipole.realtime.block_schedule import (
    ScheduleOptions,
    calibrate,
    make_schedule,
    share_computed,
)
from dipole.realtime.cost import Cost, chunk_cost
from dipole.systems.bac_checks import cache_checks, chunks, rms, scheduler_checks
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, observations, over_seeds, play, rate, train
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="bac",
    title="BAC: block-wise caching across denoising steps",
    source=Source("Block-wise Adaptive Caching for Accelerating Diffusion Policy", 2025),
    axis="reuse",
    summary=(
        "Keeps the last output of every residual branch and computes a branch again only at the steps a schedule "
        "names. The schedule comes from one uncached call: a dynamic programme per branch, and a union that keeps "
        "stale branches from feeding fresh ones. No training."
    ),
    claim="Up to three times faster at the same success.",
    spec_section="a7",
)

ENV = "micro/fork2d"
STATE = "observation.state"
SEEDS = (0, 1, 2)
DEMONSTRATIONS, EPISODES, CALIBRATION, PROBES, CALLS = 200, 100, 8, 32, 8
LEVELS, BUDGET = 100, 10
NETWORKS: dict[str, Any] = {
    "transformer": TransformerConfig(width=64, num_layers=4, num_heads=4, dropout=0.0),
    "U-Net": UNet1DConfig(down_dims=(32, 64, 128), kernel_size=3, step_embed_dim=64),
}
TRAINING: dict[str, Any] = {"steps": 2000, "batch_size": 64, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}
VARIANTS = {
    "uniform": ScheduleOptions(BUDGET, mode="uniform", bubble=0),
    "shared": ScheduleOptions(BUDGET, shared=True, bubble=0),
    "per block": ScheduleOptions(BUDGET, bubble=0),
    "per block, union": ScheduleOptions(BUDGET, bubble=5),
    "paper's objective, union": ScheduleOptions(BUDGET, objective="adjacent", bubble=5),
}
CHOSEN = "per block, union"


def build(episodes: Episodes, network: Any, seed: int, levels: int = LEVELS) -> DiffusionPolicy:
    """Return an untrained policy of the paper's kind: noise prediction in discrete levels, ancestral sampling."""
    torch.manual_seed(seed)
    config = make_config(
        episodes,
        network=full_config(network),
        process=ProcessConfig("vp-cosine", num_steps=levels),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddpm", levels, clip=1.0),
    )
    return make_policy(config, episodes).eval()


def milliseconds(policies: dict[str, Any], obs: dict[str, Tensor]) -> dict[str, float]:
    """Return median milliseconds per chunk at batch 1, policies in turn so that a busy machine treats them alike."""
    one = {key: value[:1] for key, value in obs.items()}
    times: dict[str, list[float]] = {name: [] for name in policies}
    for call, (name, policy) in itertools.product(range(CALLS + 1), policies.items()):
        began = time.perf_counter()
        policy.act(one, policy.initial_state(1), generator=[torch.Generator().manual_seed(0)])
        if call:
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values)) for name, values in times.items()}


def train_and_measure(kind: str, seed: int) -> dict[str, Any]:
    """Train one policy; return error, success, cost and time of every way to sample it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        episodes = collect(ENV, DEMONSTRATIONS, seed=COLLECT_SEED + 1000 * seed)
        policy = build(episodes, NETWORKS[kind], seed)
        horizons = (policy.obs_horizon, policy.pred_horizon, policy.action_horizon)
        windows = Windows(episodes, list(policy.config.observation), "action", *horizons)
        trained = train(policy, windows, TrainConfig(seed=seed, **TRAINING))
        return measure(trained, episodes, list(VARIANTS) if kind == "transformer" else ["uniform", CHOSEN])
    finally:
        torch.set_num_threads(threads)


def measure(policy: DiffusionPolicy, episodes: Episodes, variants: Sequence[str]) -> dict[str, Any]:
    """Return what `train_and_measure` does, for a trained policy."""
    calibration = calibrate(policy, observations(policy, episodes, CALIBRATION, seed=1))
    probes = observations(policy, episodes, PROBES, seed=2)
    cost = chunk_cost(policy, {key: value[:1] for key, value in probes.items()})
    full = chunks(policy, probes)
    policies: dict[str, Any] = {"full": policy}
    results: dict[str, Any] = {"full": {"macs": cost.total, "error": 0.0, "share": 1.0}}
    for name in variants:
        schedule = make_schedule(calibration, VARIANTS[name])
        policies[name] = BlockCachePolicy(policy, schedule)
        error = rms(chunks(policies[name], probes), full)
        results[name] = {"macs": cost.cached(schedule), "error": error, "share": share_computed(schedule)}
    results |= _ddim(policy, cost, results[CHOSEN]["macs"], policies)
    for name, chosen in policies.items():
        results[name]["success"] = float(play(chosen, ENV, EPISODES).column("success").mean())
    for name, value in milliseconds(policies, probes).items():
        results[name]["ms"] = value
    return results | {"deterministic": _deterministic(policy, cost, episodes, probes)}


def _ddim(policy: DiffusionPolicy, cost: Cost, macs: int, policies: dict[str, Any]) -> dict[str, Any]:
    """Add DDIM in 10 calls, and in as many as `macs` pay for, to the policies; return what they cost."""
    calls = {"DDIM-10": 10, "DDIM, equal cost": cost.equal_calls(macs)}
    for name, count in calls.items():
        policies[name] = policy.with_sampler(SamplerConfig("ddim", count, clip=1.0))
    return {name: {"macs": count * cost.call, "calls": count} for name, count in calls.items()}


def _deterministic(
    policy: DiffusionPolicy, cost: Cost, episodes: Episodes, probes: dict[str, Tensor]
) -> dict[str, float]:
    """Compare with DDIM where both approximate one thing: what DDIM in 100 steps makes of the same noise."""
    slow = policy.with_sampler(SamplerConfig("ddim", LEVELS, clip=1.0))
    schedule = make_schedule(calibrate(slow, observations(policy, episodes, CALIBRATION, seed=1)), VARIANTS[CHOSEN])
    calls = cost.equal_calls(cost.cached(schedule))
    exact = chunks(slow, probes)
    fewer = policy.with_sampler(SamplerConfig("ddim", calls, clip=1.0))
    return {
        "cached": rms(chunks(BlockCachePolicy(slow, schedule), probes), exact),
        "ddim": rms(chunks(fewer, probes), exact),
        "calls": calls,
    }


def small(run: Run) -> list[Claim]:
    """Train, calibrate, sample in every way."""
    jobs = []
    for kind, seeds in (("transformer", SEEDS), ("U-Net", SEEDS[:1])):
        for seed in seeds:
            config = {"network": full_config(NETWORKS[kind]), "training": TRAINING, "seed": seed, "episodes": EPISODES}
            jobs.append((f"{kind}-{seed}".lower(), config, partial(train_and_measure, kind, seed)))
    parts = run.parts(jobs)
    transformer, unet = parts[: len(SEEDS)], parts[len(SEEDS) :]

    def values(name: str, key: str) -> list[float]:
        return [part[name][key] for part in transformer]

    _plot(run, values)
    return [*_claims(values), *_against_ddim(values, transformer), *_ablation(values), *_unet(unet[0])]


def _plot(run: Run, values: Callable[[str, str], list[float]]) -> None:
    with run.plot("cost") as axes:
        for name in ("full", *VARIANTS, "DDIM-10", "DDIM, equal cost"):
            axes.plot(np.mean(values(name, "macs")) / 1e6, np.mean(values(name, "success")), "o", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("million multiply-accumulates per chunk")
        axes.set_ylabel("success")
        axes.legend()


def _claims(values: Callable[[str, str], list[float]]) -> list[Claim]:
    full, cached, uniform = (values(name, "success") for name in ("full", CHOSEN, "uniform"))
    macs = values(CHOSEN, "macs")[0] / values("full", "macs")[0]
    share = np.mean(values(CHOSEN, "share"))
    gain = [a / b for a, b in zip(values("full", "ms"), values(CHOSEN, "ms"), strict=True)]
    note = f"DDPM-100, budget {BUDGET}, union of 5; cached: {listed(cached)}; uncached: {listed(full)}"
    return [
        Claim("success is kept", "lossless", rate(cached), rate(full), Margin("difference", low=-0.02), note),
        Claim(
            "closer to the uncached chunk than uniform caching",
            "",
            over_seeds(values(CHOSEN, "error"), 0.0),
            over_seeds(values("uniform", "error"), 0.0),
            Margin("ratio", high=1.0),
            f"RMS under shared noise, physical units; uniform succeeds in {np.mean(uniform):.3f}",
        ),
        Claim(
            "multiply-accumulates",
            "0.17",
            over_seeds([a / b for a, b in zip(values(CHOSEN, "macs"), values("full", "macs"), strict=True)], 0.0),
            None,
            Margin(high=0.2),
            f"of the uncached chunk (first seed {macs:.3f}); {100 * share:.0f} % of the branches are computed",
        ),
        Claim("speed-up in time", "3.4", over_seeds(gain, 0.0), None, Margin(low=2.0), "batch 1, one thread, DDPM-100"),
    ]


def _against_ddim(values: Callable[[str, str], list[float]], parts: list[dict[str, Any]]) -> list[Claim]:
    calls = [part["DDIM, equal cost"]["calls"] for part in parts]
    times = [f"{np.median(values(name, 'ms')):.3g} ms" for name in (CHOSEN, "DDIM, equal cost", "DDIM-10")]
    deterministic = [part["deterministic"] for part in parts]
    return [
        Claim(
            "against DDIM at equal multiply-accumulates",
            "not compared",
            rate(values(CHOSEN, "success")),
            rate(values("DDIM, equal cost", "success")),
            None,
            f"success; DDIM with {calls} calls; time per chunk: cached {times[0]}, that DDIM {times[1]}, "
            f"DDIM-10 {times[2]}; success of DDIM-10: {np.mean(values('DDIM-10', 'success')):.3f}",
        ),
        Claim(
            "distance to DDIM-100 from the same noise: cached against DDIM at equal cost",
            "not compared",
            over_seeds([part["cached"] for part in deterministic], 0.0),
            over_seeds([part["ddim"] for part in deterministic], 0.0),
            None,
            f"RMS; here both approximate the same chunk; DDIM with {[part['calls'] for part in deterministic]} calls",
        ),
    ]


def _ablation(values: Callable[[str, str], list[float]]) -> list[Claim]:
    rows = [
        ("adaptive schedule shared by all branches, against uniform", "shared", "uniform", "better"),
        ("adaptive schedule per branch, against shared", "per block", "shared", "worse"),
        ("with the bubbling union, against without", CHOSEN, "per block", "better"),
        ("the paper's objective, against the code's", "paper's objective, union", CHOSEN, "same table"),
    ]
    return [
        Claim(
            text,
            paper,
            over_seeds(values(ours, "error"), 0.0),
            over_seeds(values(rival, "error"), 0.0),
            None,
            f"RMS error; success {np.mean(values(ours, 'success')):.3f} against "
            f"{np.mean(values(rival, 'success')):.3f}; branches computed {np.mean(values(ours, 'share')):.3f} "
            f"against {np.mean(values(rival, 'share')):.3f}",
        )
        for text, ours, rival, paper in rows
    ]


def _unet(part: dict[str, Any]) -> list[Claim]:
    cached, full, ddim = part[CHOSEN], part["full"], part["DDIM, equal cost"]
    note = (
        f"one seed; {cached['macs'] / full['macs']:.2f} of the multiply-accumulates, {full['ms'] / cached['ms']:.2f} "
        f"times faster; DDIM at equal cost ({ddim['calls']} calls): success {ddim['success']:.3f}, {ddim['ms']:.3g} ms "
        f"against {cached['ms']:.3g} ms"
    )
    return [
        Claim(
            "on the U-Net: success is kept",
            "unsupported",
            Measure(cached["success"]),
            Measure(full["success"]),
            Margin("difference", low=-0.02),
            note,
        )
    ]


def ci(run: Run) -> list[Claim]:
    """Check scheduler, union, cache and ledger exactly, on untrained networks."""
    episodes = collect(ENV, 3, seed=COLLECT_SEED)
    tiny = {
        "transformer": TransformerConfig(width=32, num_layers=2, num_heads=2, dropout=0.0),
        "U-Net": UNet1DConfig(down_dims=(16, 32), kernel_size=3, n_groups=8, step_embed_dim=16),
    }
    claims = scheduler_checks()
    for kind, network in tiny.items():
        policy = build(episodes, network, 0, levels=12)
        obs = observations(policy, episodes, 3, seed=0)
        claims += cache_checks(kind, policy, obs)
    return claims


TIERS = {"ci": ci, "small": small}
