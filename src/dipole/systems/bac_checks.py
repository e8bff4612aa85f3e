"""Exact checks of BAC: schedule, union, cache and ledger."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.policies import DiffusionPolicy
from dipole.realtime.backends import with_network
from dipole.realtime.block_cache import BlockCacheConfig, BlockCachePolicy, CachedNetwork
from dipole.realtime.block_schedule import (
    ScheduleOptions,
    adaptive,
    bubbling_union,
    calibrate,
    make_schedule,
    segment_values,
)
from dipole.realtime.cost import EXTRA, chunk_cost
from dipole.systems.card import Claim, Margin, Measure

ZERO = Margin(low=0.0, high=0.0)


def chunks(policy: Any, obs: dict[str, Tensor]) -> Tensor:
    """Return the chunks for some observations, row i always from the same noise."""
    count = len(next(iter(obs.values())))
    generators = [torch.Generator().manual_seed(1000 + i) for i in range(count)]
    answer: Tensor = policy.act(obs, policy.initial_state(count), generator=generators)[0]
    return answer


def rms(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return float((a - b).square().mean().sqrt())


def scheduler_checks() -> list[Claim]:
    """Compare schedules with the best of all, and apply the union twice."""
    rng = np.random.default_rng(0)
    worst = {"anchor": 0.0, "adjacent": 0.0}
    greedy_misses = grown = 0
    for _ in range(20):
        half = rng.uniform(size=(12, 12))
        matrix = (half + half.T) / 2
        for objective in ("anchor", "adjacent"):
            options = ScheduleOptions(4, objective=objective)
            worst[objective] = max(worst[objective], _shortfall(matrix, adaptive(matrix, options), options))
        found = set(adaptive(matrix, ScheduleOptions(4, objective="adjacent")))
        smallest = {0, *(1 + np.argsort(np.diagonal(matrix, 1))[:3]).tolist()}
        greedy_misses += found != smallest
        steps = {f"layer{i // 3}.{('sa', 'ca', 'ffn')[i % 3]}": (0, *rng.permutation(11)[:3] + 1) for i in range(9)}
        errors = {name: float(rng.uniform()) for name in steps}
        united = bubbling_union(steps, errors, 4)
        again = bubbling_union(united, errors, 4)
        grown += any(not set(steps[name]) <= set(united[name]) for name in steps) or again != united
    return [
        Claim("the code's objective: programme = brute force", "0", Measure(worst["anchor"]), None, Margin(high=1e-12)),
        Claim("the paper's: programme = brute force", "0", Measure(worst["adjacent"]), None, Margin(high=1e-12)),
        Claim("the paper's: optimum = least alike neighbours", "0", Measure(greedy_misses), None, ZERO, "misses of 20"),
        Claim("the union only adds calls, and once is enough", "0", Measure(grown), None, ZERO, "exceptions of 20"),
    ]


def _shortfall(matrix: np.ndarray, found: tuple[int, ...], options: ScheduleOptions) -> float:
    """Return how much better the best of all schedules is than the one found."""
    values, count = segment_values(matrix, options.objective), len(matrix)

    def total(starts: tuple[int, ...]) -> float:
        return float(sum(values[a, b] for a, b in itertools.pairwise((*starts, count))))

    rest = itertools.combinations(range(1, count), options.budget - 1)
    return max(total((0, *others)) for others in rest) - total(found)


def cache_checks(kind: str, policy: DiffusionPolicy, obs: dict[str, Tensor]) -> list[Claim]:
    """Compare cached chunks of a policy (with 12 levels) with uncached ones, and the ledger with what was computed."""
    calibration = calibrate(policy, obs)
    everything = BlockCachePolicy(policy, make_schedule(calibration, ScheduleOptions(12, bubble=0)))
    schedule = make_schedule(calibration, ScheduleOptions(3, bubble=2))
    cached = BlockCachePolicy(policy, schedule)
    first = chunks(cached, obs)
    other = {key: value + 0.5 for key, value in obs.items()}
    chunks(cached, other)
    again = float((chunks(cached, obs) - first).abs().max())
    mixed = {key: torch.cat([value[:1], other[key][1:]]) for key, value in obs.items()}
    row = float((chunks(cached, mixed)[0] - first[0]).abs().max())
    cost = chunk_cost(policy, obs)
    return [
        Claim(
            f"{kind}: all steps computed = uncached",
            "0",
            Measure(rms(chunks(everything, obs), chunks(policy, obs))),
            None,
            ZERO,
        ),
        Claim(f"{kind}: nothing is left for the next call", "0", Measure(again), None, ZERO, "largest difference"),
        Claim(f"{kind}: nor for other rows", "0", Measure(row), None, ZERO, "largest difference"),
        Claim(
            f"{kind}: ledger = operations counted",
            "1",
            Measure(_counted(policy, schedule, obs) / cost.cached(schedule)),
            None,
            Margin(low=1.0, high=1.0),
        ),
    ]


def _counted(policy: DiffusionPolicy, schedule: BlockCacheConfig, obs: dict[str, Tensor]) -> int:
    """Return the multiply-accumulates that a cached run really makes."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = {name: frozenset(chosen) for name, chosen in schedule.steps.items()}
    cached = with_network(policy, CachedNetwork(policy.network, steps))
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
        chunks(cached, obs)
    return int(counter.get_total_flops()) // 2
