"""Schedules for the block cache: when to compute which branch, from how alike its outputs are from call to call.

    calibration = calibrate(policy, observations)                 # one uncached call, remembered as numbers
    config = make_schedule(calibration, ScheduleOptions(budget=10))
    fast = BlockCachePolicy(policy, config)

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy" (BAC, 2025): the adaptive scheduler (ACS) is a
dynamic programme over cuts of the K calls into segments, each of which reuses what its first call computed; the
bubbling union (BUA) recomputes the branches that err most whenever a feed-forward branch after them is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dipole.errors import DipoleError
from dipole.realtime.block_cache import BlockCacheConfig
from dipole.realtime.block_calibration import Calibration, Metric
from dipole.realtime.block_calibration import calibrate as calibrate  # both steps can be had from here
from dipole.serialization import to_dict

_FEED_FORWARD = ("ffn", "mlp", "experts")  # last part of a branch's name, in networks that have attention as well


@dataclass(frozen=True)
class ScheduleOptions:
    """How a schedule is made from a calibration.

    Attributes:
        budget: M, the calls at which each branch is computed, the first one included (10 in the paper's tables).
        mode: `adaptive`: the dynamic programme; `uniform`: evenly spread calls.
        metric: What tells outputs apart: cosine similarity, or mean squared or absolute difference.
        objective: What the programme adds up over a segment: `anchor`, as the authors' code does, the likeness of
            every later output to the one that is reused; `adjacent`, as the paper says, that of neighbouring outputs.
        shared: One schedule for all branches, from their mean likeness.
        bubble: n, the branches with the largest error, to which the union is applied; 0 for no union. The authors'
            code skips the union for n = 1.
        force_last: Compute the last call too, whatever the budget (the authors' code does at 100 steps).
    """

    budget: int = 10
    mode: Literal["adaptive", "uniform"] = "adaptive"
    metric: Metric = "cosine"
    objective: Literal["anchor", "adjacent"] = "anchor"
    shared: bool = False
    bubble: int = 5
    force_last: bool = False


def make_schedule(calibration: Calibration, options: ScheduleOptions | None = None) -> BlockCacheConfig:
    """Return the schedule for a calibration.

    Raises:
        DipoleError: The budget does not fit the number of calls.
    """
    options = ScheduleOptions() if options is None else options
    count = calibration.num_calls
    if not 1 <= options.budget <= count:
        raise DipoleError(f"block cache: a budget of {options.budget} calls out of {count}: choose from 1 to {count}")
    matrices = calibration.matrices[options.metric]
    if options.shared:
        mean: np.ndarray = np.mean(list(matrices.values()), axis=0)
        matrices = {name: mean for name in matrices}  # noqa: C420
    if options.mode == "uniform":
        chosen = {name: tuple(i * count // options.budget for i in range(options.budget)) for name in matrices}
    else:
        chosen = {name: adaptive(matrix, options) for name, matrix in matrices.items()}
    if options.bubble:
        errors = {name: error(matrix) for name, matrix in calibration.matrices["l1"].items()}
        chosen = bubbling_union(chosen, errors, options.bubble)
    if options.force_last:
        chosen = {name: tuple(sorted({*steps, count - 1})) for name, steps in chosen.items()}
    return BlockCacheConfig(chosen, calibration.levels, calibration.weights)


def adaptive(matrix: np.ndarray, options: ScheduleOptions) -> tuple[int, ...]:
    """Return the `options.budget` calls, 0 among them, that are best for one branch (ACS)."""
    value = segment_values(matrix, options.objective)
    return cut(value if options.metric == "cosine" else -value, options.budget)


def segment_values(matrix: np.ndarray, objective: Literal["anchor", "adjacent"]) -> np.ndarray:
    """Return what a segment of calls c, ..., d - 1 adds up to, at `[c, d]`; `[K, K+1]`.

    `anchor`: the entries (c, t) for t in the segment after c; `adjacent`: the entries (t - 1, t).
    """
    count = len(matrix)
    values = np.zeros((count, count + 1))
    adjacent = np.diagonal(matrix, 1)
    for first in range(count):
        added = matrix[first, first + 1 :] if objective == "anchor" else adjacent[first:]
        values[first, first + 2 :] = np.cumsum(added)
    return values


def cut(values: np.ndarray, budget: int) -> tuple[int, ...]:
    """Return the first calls of the `budget` segments of largest total value; O(budget K^2)."""
    count = len(values)
    best = np.full((budget + 1, count + 1), -math.inf)
    came = np.zeros((budget + 1, count + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for used in range(1, budget + 1):
        for end in range(used, count + 1):
            totals = best[used - 1, :end] + values[:end, end]
            came[used, end] = int(np.argmax(totals))
            best[used, end] = totals[came[used, end]]
    starts, end = [], count
    for used in range(budget, 0, -1):
        end = int(came[used, end])
        starts.append(end)
    return tuple(reversed(starts))


def error(l1: np.ndarray) -> float:
    """Return the caching error of a branch: the mean absolute difference of its outputs over all pairs of calls."""
    pairs = np.triu_indices(len(l1), 1)
    return float(l1[pairs].mean()) if len(l1) > 1 else 0.0


def feed_forward(branches: Sequence[str]) -> set[str]:
    """Return the branches whose recomputation bubbles up: feed-forward ones; without attention all of them."""
    found = {name for name in branches if name.rpartition(".")[2] in _FEED_FORWARD}
    return found or set(branches)


def bubbling_union(
    steps: Mapping[str, tuple[int, ...]], errors: Mapping[str, float], count: int
) -> dict[str, tuple[int, ...]]:
    """Return the schedule in which the `count` branches of largest error follow the feed-forward ones after them (BUA).

    Such a branch is also computed whenever a feed-forward branch of its own layer or of a later one is (all later
    blocks in a network without attention): a fresh block fed by a stale one would carry its error on.

    Args:
        steps: Calls by branch, in the order the network computes the branches.
        errors: Caching error by branch.
        count: n.
    """
    order = list(steps)
    below = feed_forward(order)
    worst = sorted(order, key=lambda name: -errors[name])[:count]
    united = dict(steps)
    for name in worst:
        after = [steps[other] for other in order[order.index(name) :] if other in below]
        united[name] = tuple(sorted(set(steps[name]).union(*after)))
    return united


def share_computed(config: BlockCacheConfig) -> float:
    """Return which share of all branch evaluations a schedule makes."""
    calls = len(config.levels) - 1
    return sum(len(steps) for steps in config.steps.values()) / (calls * len(config.steps))


def options_table(config: BlockCacheConfig) -> dict[str, Any]:
    """Return a schedule as the `options` of a `Runtime`."""
    table: dict[str, Any] = to_dict(config)
    return table
