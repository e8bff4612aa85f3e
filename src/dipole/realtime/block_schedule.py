"""Schedules for the block cache: how alike branch outputs are from step to step, and when to compute which branch.

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
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dipole.errors import DipoleError
from dipole.policies.policy import Observation
from dipole.realtime.backends import with_network
from dipole.realtime.block_cache import BlockCacheConfig, cacheable, visited_levels, weights_digest
from dipole.serialization import from_dict, read_json, to_dict, write_json

FILE = "block_cache.json"
FORMAT = 1

Metric = Literal["cosine", "mse", "l1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
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


@dataclass(frozen=True, eq=False)
class Calibration:
    """How alike the outputs of each branch are at any two calls of a sampling run, averaged over observations.

    Attributes:
        levels: Levels visited (`[L+1]`).
        weights: Digest of the network's weights.
        observations: How many were averaged over.
        matrices: Metric -> branch -> symmetric `[K, K]`.
    """

    levels: tuple[float, ...]
    weights: str
    observations: int
    matrices: dict[Metric, dict[str, np.ndarray]]

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the branches, in the order they are computed."""
        return tuple(self.matrices["cosine"])

    @property
    def num_calls(self) -> int:
        """Return K."""
        return len(self.matrices["cosine"][self.branches[0]])

    def save(self, folder: str | Path) -> Path:
        """Write `block_cache.json` into a checkpoint folder; return the file."""
        path = Path(folder) / FILE
        index = np.triu_indices(self.num_calls)
        table = {
            "format": FORMAT,
            "levels": list(self.levels),
            "weights": self.weights,
            "observations": self.observations,
            "num_calls": self.num_calls,
            # six digits are more than a few observations can tell, and keep the file readable
            "matrices": {
                metric: {name: [float(f"{v:.6g}") for v in matrix[index]] for name, matrix in part.items()}
                for metric, part in self.matrices.items()
            },
        }
        write_json(path, table)
        return path


@dataclass(frozen=True)
class _Stored:
    format: int
    levels: tuple[float, ...]
    weights: str
    observations: int
    num_calls: int
    matrices: dict[str, dict[str, tuple[float, ...]]]


def load_calibration(folder: str | Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        DipoleError: The file is missing or is something else.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    stored = from_dict(_Stored, read_json(path), str(path))
    count = stored.num_calls
    sizes = {len(values) for part in stored.matrices.values() for values in part.values()}
    if stored.format != FORMAT or set(stored.matrices) != set(METRICS) or sizes != {count * (count + 1) // 2}:
        raise DipoleError(f"{path}: not a calibration of format {FORMAT}: remove it and calibrate again")
    matrices: Any = {
        metric: {name: _symmetric(values, count) for name, values in part.items()}
        for metric, part in stored.matrices.items()
    }
    return Calibration(stored.levels, stored.weights, stored.observations, matrices)


def _symmetric(values: Sequence[float], count: int) -> np.ndarray:
    matrix = np.zeros((count, count))
    matrix[np.triu_indices(count)] = values
    return np.triu(matrix) + np.triu(matrix, 1).T


class _Recorder(nn.Module):
    """Calls a network and keeps every branch's output, `[K]` of `[B, n]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in network.branches}  # type: ignore[union-attr]

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.network(x, time, cond, self._hook)
        return out

    def _hook(self, name: str, compute: Any) -> Tensor:
        out: Tensor = compute()
        self.outputs[name].append(out.flatten(1))
        return out


@torch.no_grad()
def calibrate(policy: Any, observations: Observation, seed: int = 0, rows: int = 4) -> Calibration:
    """Run a policy uncached on some observations and compare the outputs of each branch at any two calls.

    Args:
        policy: A policy whose network has branches.
        observations: Raw observations `[N, To, ...]`.
        seed: Of the noise.
        rows: Observations at once: what is kept in memory is the output of every branch at every call for these.

    Raises:
        DipoleError: The network's branches cannot be intercepted.
    """
    reason = cacheable(policy)
    if reason is not None:
        raise DipoleError(f"block cache: {reason}")
    count = len(next(iter(observations.values())))
    sums: dict[Metric, dict[str, np.ndarray]] = {metric: {} for metric in METRICS}
    for start in range(0, count, rows):
        part = {key: value[start : start + rows] for key, value in observations.items()}
        size = len(next(iter(part.values())))
        recorder = _Recorder(policy.network)
        generators = [torch.Generator().manual_seed(seed * count + start + i) for i in range(size)]
        with_network(policy, recorder).act(part, policy.initial_state(size), generator=generators)
        for name, outputs in recorder.outputs.items():
            for metric, value in _compare(torch.stack(outputs, 1).double()).items():
                sums[metric][name] = sums[metric].get(name, 0) + value.sum(0).cpu().numpy()
    means: Any = {metric: {name: total / count for name, total in part.items()} for metric, part in sums.items()}
    return Calibration(visited_levels(policy), weights_digest(policy.network), count, means)


def _compare(outputs: Tensor) -> dict[Metric, Tensor]:
    """Return each metric between the K outputs of every row: `[B, K, n]` -> `[B, K, K]`."""
    gram = outputs @ outputs.mT
    square = gram.diagonal(dim1=1, dim2=2)
    norm = square.sqrt().clamp(min=1e-30)
    size = outputs.shape[-1]
    distance = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp(min=0)
    return {
        "cosine": gram / (norm[:, :, None] * norm[:, None, :]),
        "mse": distance / size,
        "l1": torch.cdist(outputs, outputs, p=1) / size,
    }


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
