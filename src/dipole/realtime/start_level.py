"""Choosing the start level of a warm start (`dipole.realtime.rti`) by measuring how a trained policy contracts.

Around a demonstrated chunk the guess is displaced by +-offset, alike at all positions (errors of a warm start are
smooth: the goal has moved), both are denoised without noise from each candidate level, and the share of the
displacement that is left is recorded. It needs demonstrations, not an environment, and takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dipole.data import Episodes, Windows
from dipole.diffusion import DDIM, DDPM, VP, Kernel
from dipole.errors import DipoleError
from dipole.realtime.rti import RTIConfig, StartLevel, residual, spaced, warm_levels

CANDIDATES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60)
"""Levels of DDPM's 100 that are tried; of another process those with the same sigma / alpha."""


def calibrate(
    policy: Any,
    episodes: Episodes,
    options: RTIConfig | None = None,
    *,
    left: float = 0.3,
    windows: int = 256,
    seed: int = 0,
) -> RTIConfig:
    """Return options with the lowest start level that leaves at most `left` of an error, and the table it is from.

    Where no candidate does, the one that leaves least is taken.

    Args:
        policy: The trained policy.
        episodes: Demonstrations.
        options: Everything else; `num_steps` is the number of network calls (fewer where a level allows fewer).
        left: Share of an error that may be left.
        windows: How many windows of the demonstrations are used.
        seed: Of their choice.
    """
    options = RTIConfig() if options is None else options
    keys = list(policy.config.observation)
    horizons = (policy.obs_horizon, policy.pred_horizon, policy.action_horizon)
    found = Windows(episodes, keys, "action", *horizons)
    chosen = np.random.default_rng(seed).choice(len(found), min(windows, len(found)), replace=False)
    device = next(policy.parameters()).device
    batch = {key: torch.from_numpy(value).to(device) for key, value in found.batch(np.sort(chosen)).items()}
    generator = torch.Generator(device).manual_seed(seed)
    table = contraction_table(policy, batch, candidates(policy.process), options, generator=generator)
    best = next((row for row in table if row.left <= left), min(table, key=lambda row: row.left))
    levels = _levels(best.level, options, policy.process)
    return replace(options, levels=levels, start_level=best.level, table=table)


def candidates(process: Any) -> tuple[float, ...]:
    """Return the start levels tried in a process, rising."""
    reference = VP.cosine(100)
    ratio = torch.stack([reference.sigma(level) / reference.alpha(level) for level in CANDIDATES])
    return tuple(sorted(set(process.level_at(ratio).tolist())))


def contraction_table(
    policy: Any,
    batch: Mapping[str, Tensor],
    starts: Sequence[float],
    options: RTIConfig | None = None,
    *,
    offset: float = 0.05,
    generator: Generator | None = None,
) -> tuple[StartLevel, ...]:
    """Return how much of a displacement is left after the warm steps from each start level.

    Args:
        policy: The trained policy.
        batch: Raw windows: observations `[B, To, ...]` and `action` `[B, Tp, Da]`.
        starts: Start levels.
        options: The kernel and number of steps.
        offset: Standard deviation of the displacement, normalised units.
        generator: Of its direction.
    """
    options = RTIConfig() if options is None else options
    if "action" not in batch:
        raise DipoleError("the contraction is measured on windows of demonstrations: the batch has no 'action'")
    kernel: Kernel = DDPM(clip=policy.sampler.clip) if options.kernel == "ddpm" else DDIM(clip=policy.sampler.clip)
    first = policy.obs_horizon - 1
    due = slice(first, first + policy.action_horizon)
    rows = []
    with torch.no_grad():
        cond = policy.encode(batch)
        x0 = policy.normalizer.normalize("action", batch["action"])
        shape = (len(x0), 1, x0.shape[-1])
        push = offset * torch.randn(shape, generator=generator, device=x0.device, dtype=x0.dtype)
        for start in starts:
            levels = _levels(start, options, policy.process)
            ends = [_without_noise(policy, x0 + sign * push, levels, kernel, cond) for sign in (1, -1)]
            moved = (ends[0] - ends[1])[:, due].flatten(1).norm(dim=1)
            share = moved / (2 * push.expand_as(x0)[:, due].flatten(1).norm(dim=1))
            high = float(torch.quantile(share, 0.9))
            rows.append(StartLevel(float(start), float(share.mean()), high, len(levels)))
    return tuple(rows)


def fitted_std(table: Sequence[StartLevel], options: RTIConfig, process: Any) -> float:
    """Return the std of the Gaussian conditional whose residuals (`rti.residual`) are nearest to a measured table."""
    grid = torch.logspace(-3, 0, 61, dtype=torch.float64).tolist()
    levels = [_levels(row.level, options, process) for row in table]

    def distance(std: float) -> float:
        return math.dist([residual(process, listed, std) for listed in levels], [row.left for row in table])

    return float(min(grid, key=distance))


def _levels(start: float, options: RTIConfig, process: Any) -> tuple[float, ...]:
    steps = min(options.num_steps, int(start) + 1) if isinstance(process, VP) else options.num_steps
    return warm_levels(replace(options, levels=spaced(start, steps, process)), process)


def _without_noise(policy: Any, x: Tensor, levels: tuple[float, ...], kernel: Kernel, cond: Any) -> Tensor:
    process = policy.process
    for t, s in pairwise((*levels, process.clean)):
        x = kernel.step(x, policy.denoiser(x, t, cond), t, s, process).mean
    return x
