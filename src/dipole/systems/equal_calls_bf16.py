"""A U-Net of 63.5 million parameters, packed, in bf16 against fp32: the same episodes, the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dipole.evaluation.statistics import mcnemar, paired_difference
from dipole.realtime import Runtime, apply
from dipole.systems.card import Claim, Margin, Measure
from dipole.systems.equal_calls_bases import REACH, demonstrations, policy_of
from dipole.systems.equal_calls_ways import EPISODES, played, simulators
from dipole.systems.experiment import observations

PRECISIONS = ("fp32", "bf16")
PROBES = 32


def compare_precisions(demos: str, folder: str) -> dict[str, Any]:
    """Return the success of every episode in both precisions, and how far actions differ from the same noise."""
    policy = policy_of(folder)
    packed = {name: apply(policy, Runtime(backend="packed", precision=name)) for name in PRECISIONS}
    obs = observations(policy, demonstrations(REACH, demos), PROBES)
    noise = torch.randn(PROBES, policy.pred_horizon, policy.action_dim, generator=torch.Generator().manual_seed(0))
    chunks = [packed[name].act(obs, {}, noise=noise)[0] for name in PRECISIONS]
    apart = (chunks[0] - chunks[1]).abs()
    env = simulators(REACH)
    try:
        scores = {name: played(packed[name], env, 0)["score"] for name in PRECISIONS}
    finally:
        env.close()
    return {**scores, "largest": float(apart.max()), "rms": float(apart.square().mean().sqrt())}


def bf16_claims(found: dict[str, Any], parameters: float) -> list[Claim]:
    """Return whether bf16 keeps the success, by the paired test."""
    full, half = (np.array(found[name]) > 0 for name in PRECISIONS)
    both, neither = int((full & half).sum()), int((~full & ~half).sum())
    only = int((full & ~half).sum()), int((half & ~full).sum())
    difference = paired_difference(both, *only, neither)
    return [
        Claim(
            f"{parameters / 1e6:.1f} M, packed: success in bf16 as in fp32",
            "unchanged",
            Measure(difference.value, difference.low, difference.high),
            None,
            Margin(low=-0.02),
            f"difference over {EPISODES} paired episodes of {REACH.name}, DDIM-10; fp32 {full.mean():.2f}, bf16 "
            f"{half.mean():.2f}; solved by fp32 only: {only[0]}, by bf16 only: {only[1]}; McNemar's exact test: p = "
            f"{mcnemar(*only):.2g}",
        ),
        Claim(
            "largest difference between an action in bf16 and in fp32",
            "",
            Measure(found["largest"]),
            None,
            None,
            f"actions from -1 to 1, {PROBES} chunks from the same noise; root mean square {found['rms']:.1e}",
        ),
    ]
