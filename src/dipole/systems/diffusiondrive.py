"""DiffusionDrive: two denoising steps from anchors, where diffusion from noise needs twenty.

Source: Liao et al., "DiffusionDrive: Truncated Diffusion Model for End-to-End Autonomous Driving" (CVPR 2025). Tier
`ci` checks what holds for any weights. Tier `small` learns the plans of `micro/lanes` (several manoeuvres are right in
most scenes), with the cascade and, with the same data, view encoder and number of updates, a U-Net that denoises from
N(0, I).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dipole.networks.cascade import CascadeConfig
from dipole.policies import SamplerConfig
from dipole.policies.diffusion_drive import DiffusionDrivePolicy, make_diffusion_drive
from dipole.serialization import to_dict
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.diffusiondrive_baseline import UNetPlanner
from dipole.systems.diffusiondrive_checks import exact_checks
from dipole.systems.diffusiondrive_scenes import (
    DIVERSITY_SCENES,
    Scenes,
    held_out,
    judge,
    spread,
    training_data,
)
from dipole.systems.experiment import listed, number_of_parameters, over_seeds, rate, train
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="diffusiondrive",
    title="DiffusionDrive: truncated diffusion from anchor plans with scores",
    source=Source("DiffusionDrive: Truncated Diffusion Model for End-to-End Autonomous Driving", 2025, "2411.15139"),
    axis="start and levels",
    summary=(
        "Denoising starts from noisy centres of demonstrated plans instead of pure noise, all candidates at once; a "
        "cascade decoder looks at the bird's-eye view along each candidate, refines it and scores it."
    ),
    claim="Two steps instead of twenty, more diverse candidates, better driving.",
    spec_section="a4",
)

SEEDS = (0, 1, 2)
SCENES, HELD_OUT, CANDIDATES = 6000, 500, 20
NETWORK = CascadeConfig(
    width=64, stages=2, num_heads=4, feedforward=128, point_embed=16, agent_queries=8, bev_hidden=(16, 32)
)
VIEW: dict[str, Any] = {"view_low": (-4.0, -12.0), "view_cell": (2.0, 0.75)}
TRAINING: dict[str, Any] = {
    "steps": 800,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "ema_decay": 0.99,
    "precision": "fp32",
}
ABLATIONS = {"no view along the path": "bev_sampling", "no agents": "agent_attention"}
CALLS = 40


def milliseconds(plan: Callable[[dict[str, torch.Tensor]], Any], scenes: Scenes) -> float:
    """Return the median time of one plan, one scene at a time, one thread."""
    one = {key: value[:1] for key, value in scenes.obs.items()}
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(CALLS):
            began = time.perf_counter()
            plan(one)
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 1000 * float(np.median(times[5:]))


def run_cascade(seed: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train DiffusionDrive once and judge it with every way of visiting the levels."""
    windows, source = training_data(seed, SCENES)
    network = replace(NETWORK, **(changes or {}))
    policy = make_diffusion_drive(windows, seed=seed, network=network, num_anchors=CANDIDATES, **VIEW)
    trained: DiffusionDrivePolicy = train(policy, source, TrainConfig(seed=seed, **TRAINING))
    scenes = held_out(HELD_OUT)
    results: dict[str, Any] = {"parameters": number_of_parameters(trained)}
    for levels in ("published", "consistent"):
        for steps in (1, 2, 3) if changes is None else (2,):
            planner = trained.with_options(num_steps=steps, levels=levels)
            poses, logits = planner.propose(scenes.obs, generator=torch.Generator().manual_seed(0))
            best = poses[torch.arange(len(poses)), logits.argmax(1), :, :2].double().numpy()
            results[f"{levels}{steps}"] = judge(best, scenes)
            if (levels, steps) == ("published", 2):
                results["diversity"] = spread(poses[..., :2].double().numpy())
                g = torch.Generator().manual_seed(0)
                results["ms"] = milliseconds(partial(planner.act, state={}, generator=g), scenes)
    return results


def run_unet(seed: int) -> dict[str, Any]:
    """Train the U-Net on the same scenes and judge it with 20 and with 2 steps."""
    windows, source = training_data(seed, SCENES)
    like = make_diffusion_drive(windows, seed=seed, network=NETWORK, num_anchors=CANDIDATES, **VIEW)
    trained: UNetPlanner = train(UNetPlanner(like, seed), source, TrainConfig(seed=seed, **TRAINING))
    scenes = held_out(HELD_OUT)
    results: dict[str, Any] = {"parameters": number_of_parameters(trained)}
    for name, sampler in {
        "ddim20": SamplerConfig("ddim", 20, "leading", clip=1.0),
        "ddim2 leading": SamplerConfig("ddim", 2, "leading", clip=1.0),
        "ddim2 trailing": SamplerConfig("ddim", 2, "trailing", clip=1.0),
    }.items():
        one = trained.propose(scenes.obs, 1, sampler, torch.Generator().manual_seed(0))[:, 0]
        some = {key: value[:DIVERSITY_SCENES] for key, value in scenes.obs.items()}
        many = trained.propose(some, CANDIDATES, sampler, torch.Generator().manual_seed(1))
        results[name] = judge(one.double().numpy(), scenes) | {"diversity": spread(many.double().numpy())}
        plan = partial(trained.propose, count=1, sampler=sampler, generator=torch.Generator().manual_seed(0))
        results[name]["ms"] = milliseconds(plan, scenes)
    return results


def train_and_judge(name: str, seed: int) -> dict[str, Any]:
    """Return the scores of the `unet`, of the `cascade`, or of the cascade without what an ablation names."""
    if name == "unet":
        return run_unet(seed)
    return run_cascade(seed, {ABLATIONS[name]: False} if name in ABLATIONS else None)


def small(run: Run) -> list[Claim]:
    """Train cascade, U-Net and two ablations on three seeds."""
    config = {
        "network": to_dict(NETWORK),
        "training": TRAINING,
        "scenes": [SCENES, HELD_OUT, CANDIDATES],
        "view": [list(pair) for pair in VIEW.values()],
    }

    parts = run.grid(("cascade", "unet", *ABLATIONS), SEEDS, config, train_and_judge)
    ours, unet, without = parts["cascade"], parts["unet"], {name: parts[name] for name in ABLATIONS}
    few = min(("ddim2 leading", "ddim2 trailing"), key=lambda name: np.mean([part[name]["ade"] for part in unet]))
    _plot(run, ours, unet, few)
    return [*_against_noise(ours, unet, few), *_ablations(ours, without), *_steps(ours), *exact_checks()]


def _against_noise(ours: list[dict[str, Any]], unet: list[dict[str, Any]], few: str) -> list[Claim]:
    def mine(key: str) -> list[float]:
        return [part["published2"][key] for part in ours]

    def theirs(name: str, key: str) -> list[float]:
        return [part[name][key] for part in unet]

    ade, slow, fast = mine("ade"), theirs("ddim20", "ade"), theirs(few, "ade")
    apart, alike = [part["diversity"] for part in ours], theirs("ddim20", "diversity")
    return [
        Claim(
            "two truncated steps plan as well as twenty from noise (ADE)",
            "88.1 against 84.6 PDMS",
            over_seeds(ade, 0.0, unit="m"),
            over_seeds(slow, 0.0, unit="m"),
            Margin("difference", high=0.0),
            f"to what the demonstrator happened to choose; {listed(ade)}; baseline {listed(slow)}",
        ),
        Claim(
            "two steps from noise are clearly worse (ADE)",
            "clearly worse",
            over_seeds(ade, 0.0, unit="m"),
            over_seeds(fast, 0.0, unit="m"),
            Margin("ratio", high=0.9),
            f"the U-Net with {few}, the better spacing; 'clearly' is read as 10 %",
        ),
        Claim(
            "candidates are diverse (D)", "0.74", rate(apart), rate(alike), Margin(low=0.5), f"{CANDIDATES} candidates"
        ),
        Claim("samples of the U-Net are less so (D)", "0.11", rate(alike), None, Margin(high=0.3), "DDIM-20"),
        Claim("network calls", "2 against 20", Measure(2), Measure(20), Margin("ratio", high=1 / 8)),
        Claim(
            "time of a plan",
            "7.6 against 130 ms",
            over_seeds([part["ms"] for part in ours], 0.0, unit="ms"),
            over_seeds(theirs("ddim20", "ms"), 0.0, unit="ms"),
            None,
            "batch 1, one thread",
        ),
        *(
            Claim(
                text,
                "",
                measure(mine(key)),
                measure(theirs("ddim20", key)),
                None,
                f"against DDIM-20; {listed(mine(key))}",
            )
            for key, text, measure in (
                ("score", "driving score", rate),
                ("collision", "share of plans that collide", rate),
                ("off_road", "share of plans that leave the lanes", rate),
                ("to_legal", "distance to the nearest legal manoeuvre (m)", partial(over_seeds, low=0.0)),
            )
        ),
    ]


def _ablations(ours: list[dict[str, Any]], without: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    full = [part["published2"]["score"] for part in ours]
    scores = {name: [part["published2"]["score"] for part in parts] for name, parts in without.items()}
    view, agents = (scores[name] for name in ABLATIONS)
    return [
        Claim(
            "looking along the path matters most (driving score)",
            "87.1 with the view only, 85.1 with agents only",
            rate(view),
            rate(agents),
            Margin("difference", high=0.0),
            f"ours: without it; baseline: without the agents; the whole decoder {np.mean(full):.3f}",
        )
    ]


def _steps(ours: list[dict[str, Any]]) -> list[Claim]:
    two = [part["published2"]["score"] for part in ours]
    return [
        Claim(
            f"driving score, {levels} levels, {steps} step{'s' if steps > 1 else ''}",
            {1: "87.9", 2: "88.1", 3: "88.1"}[steps] if levels == "published" else "",
            rate([part[f"{levels}{steps}"]["score"] for part in ours]),
            rate(two),
            None,
            "baseline: published levels, 2 steps",
        )
        for levels in ("published", "consistent")
        for steps in (1, 2, 3)
        if (levels, steps) != ("published", 2)
    ]


def _plot(run: Run, ours: list[dict[str, Any]], unet: list[dict[str, Any]], few: str) -> None:
    with run.plot("plans") as axes:
        axes.scatter([p["ms"] for p in ours], [p["published2"]["score"] for p in ours], label="DiffusionDrive, 2 steps")
        for name in ("ddim20", few):
            axes.scatter([p[name]["ms"] for p in unet], [p[name]["score"] for p in unet], label=f"U-Net, {name}")
        axes.set_xlabel("ms per plan")
        axes.set_ylabel("driving score")
        axes.legend()


def ci(run: Run) -> list[Claim]:
    """Check what holds for any weights."""
    return exact_checks()


TIERS = {"ci": ci, "small": small}
