"""How long a policy thinks: wall-clock time per chunk at batch 1, and network calls per chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dipole.evaluation.blocks import acting, device_of
from dipole.evaluation.seeds import policy_generator
from dipole.policies.policy import Policy


@dataclass(frozen=True)
class Latency:
    """Milliseconds from observation to chunk, one observation at a time.

    Attributes:
        p50_ms: Median.
        p95_ms: 95th percentile.
        mean_ms: Mean.
        calls: How many chunks were timed, after the warm-up.
        threads: Threads torch used.
        device: Where the policy ran.
    """

    p50_ms: float
    p95_ms: float
    mean_ms: float
    calls: int
    threads: int
    device: str


def measure_latency(
    policy: Policy,
    obs: Mapping[str, Tensor],
    *,
    calls: int = 50,
    warmup: int = 5,
    threads: Sequence[int] | None = None,
) -> list[Latency]:
    """Time `policy.act` at batch 1, state handed on from call to call.

    Args:
        policy: The policy.
        obs: One observation, each `[1, To, ...]`.
        calls: Timed calls.
        warmup: Calls before them, not timed.
        threads: Numbers of torch threads to try; default 1 and the present number. The setting is restored.
    """
    before = torch.get_num_threads()
    chosen = sorted({1, before}) if threads is None else list(threads)
    device = device_of(policy)
    batch = {key: value.to(device) for key, value in obs.items()}
    try:
        results = []
        for count in chosen:
            torch.set_num_threads(count)
            times = _times(policy, batch, device, calls, warmup)
            p50, p95 = np.percentile(times, [50, 95])
            results.append(Latency(float(p50), float(p95), float(times.mean()), calls, count, str(device)))
        return results
    finally:
        torch.set_num_threads(before)


def _times(policy: Policy, obs: dict[str, Tensor], device: torch.device, calls: int, warmup: int) -> np.ndarray:
    """Return `[calls]` milliseconds."""
    times = np.zeros(calls)
    generator = policy_generator(0, device)
    with acting(policy):
        state = policy.initial_state(1)
        for k in range(-warmup, calls):
            begin = time.perf_counter()
            chunk, state = policy.act(obs, state, generator=[generator])
            chunk.cpu()  # waits for the accelerator, as the robot does
            if k >= 0:
                times[k] = 1000 * (time.perf_counter() - begin)
    return times


def count_network_calls(policy: Any, obs: Mapping[str, Tensor]) -> int | None:
    """Return the network calls (nfe) of one chunk, counted; if they cannot be seen, what the sampler says, or None.

    Of a policy that remembers something it is those of the second chunk: the first may be the dear one.
    """
    network = getattr(policy, "network", None)
    networks = [network] if isinstance(network, nn.Module) else list(getattr(policy, "networks", ()))
    device = device_of(policy)
    batch = {key: value.to(device) for key, value in obs.items()}
    if networks:
        with acting(policy), _counting(networks) as seen:
            state = policy.initial_state(1)
            for _ in range(2 if state else 1):
                seen.clear()
                _, state = policy.act(batch, state, generator=[policy_generator(0, device)])
        if seen:
            return len(seen)
    return getattr(getattr(policy, "sampler", None), "nfe", None)


@contextmanager
def _counting(networks: Sequence[nn.Module]) -> Iterator[list[None]]:
    seen: list[None] = []
    hooks = [network.register_forward_pre_hook(lambda module, inputs: seen.append(None)) for network in networks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
